"""Commands that ask a running monitor, or read the store it left."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream_monitor.cli_fail import fail

if TYPE_CHECKING:
    from stream_monitor.target import Target

app = typer.Typer()

Address = Annotated[str, typer.Option(help="Address of the monitor: host:port or unix:/path.")]
Ca = Annotated[str, typer.Option(help="Speak TLS: file of the CAs that may have signed for the monitor, or `system`.")]
Certificate = Annotated[str, typer.Option(help="File of the certificate to show to the monitor.")]
Key = Annotated[str, typer.Option(help="File of its key.")]
TokenFile = Annotated[str, typer.Option(help="File of the bearer token to show to the monitor.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Speak without TLS beyond this host.")]


def _target(address: str, ca: str, certificate: str, key: str, token_file: str, insecure: bool) -> "Target":
    from stream_monitor.target import Target, TargetError

    try:
        return Target(address, ca, certificate, key, token_file, insecure)
    except TargetError as error:
        fail(f"--target: {error}; see --ca, --certificate, --key, --token-file and --insecure")


@app.command(help="Follow requests and events: a live table, or with --json one event per line.")
def watch(
    target: Address = "127.0.0.1:9750",
    json: Annotated[bool, typer.Option("--json", help="One JSON event per line.")] = False,
    request: Annotated[
        list[str] | None, typer.Option(help="Only this request, by internal or external id; may be repeated.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only events of this kind, such as anchor_shift; may be repeated.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Progress events too, not findings alone.")] = False,
    ca: Ca = "",
    certificate: Certificate = "",
    key: Key = "",
    token_file: TokenFile = "",
    insecure: Insecure = False,
) -> None:
    from stream_monitor.client import MonitorError, TargetError
    from stream_monitor.monitor import watch as watching

    monitor_at = _target(target, ca, certificate, key, token_file, insecure)
    try:
        kinds = watching.kinds(kind or [], everything)
    except ValueError as error:
        fail(f"--kind: {error}")
    try:
        asyncio.run(watching.follow(monitor_at, request or [], kinds, json))
    except KeyboardInterrupt:
        return
    except BrokenPipeError:
        # Whoever read us (such as head) has enough.
        sys.stdout = None
    except (MonitorError, TargetError) as error:
        fail(error)


@app.command(help="Print one request's anchor curve and findings, and what one of its findings rests on.")
def explain(
    request_id: Annotated[str, typer.Argument(help="Internal or external id of the request.")],
    number: Annotated[int | None, typer.Argument(help="Number of the finding, from 1.")] = None,
    target: Address = "127.0.0.1:9750",
    ca: Ca = "",
    certificate: Certificate = "",
    key: Key = "",
    token_file: TokenFile = "",
    insecure: Insecure = False,
) -> None:
    from rich.console import Console

    from stream_monitor.client import MonitorError, TargetError
    from stream_monitor.monitor.explain import NoSuchFinding
    from stream_monitor.monitor.explain import explain as run

    monitor_at = _target(target, ca, certificate, key, token_file, insecure)
    try:
        run(monitor_at, request_id, number, Console())
    except (MonitorError, NoSuchFinding, TargetError) as error:
        fail(error)


@app.command(help="Make a profile, from the requests a monitor holds, so that findings have a known false-alarm rate.")
def calibrate(
    out: Annotated[Path, typer.Option(help="File to write; name it to the monitor with --profiles.")],
    target: Address = "127.0.0.1:9750",
    model_name: Annotated[str, typer.Option(help="Model whose requests to take.")] = "",
    trim: Annotated[
        float, typer.Option(help="Share of the requests whose highest scores are left out: 0 for traffic known clean.")
    ] = 0.01,
    ca: Ca = "",
    certificate: Certificate = "",
    key: Key = "",
    token_file: TokenFile = "",
    insecure: Insecure = False,
) -> None:
    from stream_monitor.anchors.profile import ProfileError
    from stream_monitor.client import MonitorError, TargetError
    from stream_monitor.monitor.calibrate import calibrate as run

    monitor_at = _target(target, ca, certificate, key, token_file, insecure)
    try:
        typer.echo(run(monitor_at, out, model_name, trim))
    except (MonitorError, ProfileError, TargetError) as error:
        fail(error)


@app.command(help="Remove a request from a monitor's memory and store for good.")
def delete(
    request_id: Annotated[str, typer.Argument(help="Internal or external id of the request.")],
    engine_instance: Annotated[str, typer.Option(help="Of several requests with the id, the one of this engine.")] = "",
    sample_index: Annotated[int | None, typer.Option(help="Of several samples, this one.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All requests that these leave.")] = False,
    target: Address = "127.0.0.1:9750",
    ca: Ca = "",
    certificate: Certificate = "",
    key: Key = "",
    token_file: TokenFile = "",
    insecure: Insecure = False,
) -> None:
    from stream_monitor.client import Monitor, MonitorError, TargetError

    monitor_at = _target(target, ca, certificate, key, token_file, insecure)
    try:
        with Monitor(monitor_at) as monitor:
            gone = monitor.delete_request(
                request_id, engine_instance=engine_instance, sample_index=sample_index, every=every
            )
    except (MonitorError, TargetError) as error:
        fail(error)
    for deleted in gone:
        typer.echo(f"deleted {deleted.request_id} of engine {deleted.engine_instance}")


@app.command(help="Write the events and traces of a monitor's store to files, whether the monitor runs or not.")
def export(
    format: Annotated[str, typer.Option(help="parquet or jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for the files; new, or empty.")],
    store: Annotated[str | None, typer.Option(help="File of the store; the monitor's own by default.")] = None,
    since: Annotated[str, typer.Option(help="From this time on, such as 2026-11-26 or 2026-11-26T07:00+01:00.")] = "",
    until: Annotated[str, typer.Option(help="Up to this time.")] = "",
    model_name: Annotated[str, typer.Option("--model", help="Of this model alone.")] = "",
    tenant: Annotated[str, typer.Option(help="Of this tenant alone.")] = "",
) -> None:
    from stream_monitor.config import MonitorSettings, SettingsError, load
    from stream_monitor.monitor.export import ExportError
    from stream_monitor.monitor.export import export as run

    try:
        path = load(MonitorSettings, store=store).store
        typer.echo(run(path, out, format, since, until, model_name, tenant))
    except (SettingsError, ExportError) as error:
        fail(error)


@app.command(help="Make a bearer token: into a file, and what the access file needs of it to standard output.")
def token(out: Annotated[Path, typer.Option(help="File for the token; new, and readable by you alone.")]) -> None:
    import hashlib
    import os
    import secrets

    made = secrets.token_urlsafe(32)
    try:
        with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(f"{made}\n")
    except OSError as error:
        fail(f"--out: cannot make {out}: {error.strerror}")
    typer.echo(f'token_sha256 = "{hashlib.sha256(made.encode()).hexdigest()}"')
