"""Commands that ask a running monitor, or read the store it left."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream_monitor.cli_fail import fail
from stream_monitor.cli_target import reaches_a_monitor

if TYPE_CHECKING:
    from stream_monitor.target import Target

app = typer.Typer()


@app.command(
    help="Follow requests and events: a live table, or one event per line, plain into a file or pipe, or with --json."
)
@reaches_a_monitor
def watch(
    monitor_at: "Target",
    json: Annotated[bool, typer.Option("--json", help="One JSON event per line.")] = False,
    request: Annotated[
        list[str] | None, typer.Option(help="Only this request, by internal or external id; may be repeated.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only events of this kind, such as anchor_shift; may be repeated.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Progress events too, not findings alone.")] = False,
) -> None:
    from stream_monitor.monitor import watch as watching

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


@app.command(help="Print one request's anchor curve and findings, and what one of its findings rests on.")
@reaches_a_monitor
def explain(
    monitor_at: "Target",
    request_id: Annotated[str, typer.Argument(help="Internal or external id of the request.")],
    number: Annotated[int | None, typer.Argument(help="Number of the finding, from 1.")] = None,
) -> None:
    from rich.console import Console

    from stream_monitor.monitor.explain import NoSuchFinding
    from stream_monitor.monitor.explain import explain as run

    try:
        run(monitor_at, request_id, number, Console())
    except NoSuchFinding as error:
        fail(error)


@app.command(help="Make a profile, from the requests a monitor holds, so that findings have a known false-alarm rate.")
@reaches_a_monitor
def calibrate(
    monitor_at: "Target",
    out: Annotated[Path, typer.Option(help="File to write; name it to the monitor with --profiles.")],
    model_name: Annotated[str, typer.Option(help="Model whose requests to take.")] = "",
    trim: Annotated[
        float, typer.Option(help="Share of the requests whose highest scores are left out: 0 for traffic known clean.")
    ] = 0.01,
    injections: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with request, group (followed, or what else it is) and wording: the probe of "
            "UNTRUSTED_ANCHOR is fitted to these."
        ),
    ] = None,
    joints: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with request, subject (that it begins with) and token (the first about another, or null): "
            "the probe of ANCHOR_SHIFT is fitted to these."
        ),
    ] = None,
    probe_of: Annotated[
        Path | None,
        typer.Option(help="Profile whose probes are kept where none is fitted by --injections or --joints."),
    ] = None,
) -> None:
    from stream_monitor.anchors.profile import ProfileError
    from stream_monitor.monitor.calibrate import calibrate as run

    if None not in (injections, joints, probe_of):
        fail("give --injections and --joints, or --probe-of in place of one: no probe would be left to keep")
    try:
        typer.echo(run(monitor_at, out, model_name, trim, injections, joints, probe_of))
    except ProfileError as error:
        fail(error)


@app.command(help="Remove a request from a monitor's memory and store for good.")
@reaches_a_monitor
def delete(
    monitor_at: "Target",
    request_id: Annotated[str, typer.Argument(help="Internal or external id of the request.")],
    engine_instance: Annotated[str, typer.Option(help="Of several requests with the id, the one of this engine.")] = "",
    sample_index: Annotated[int | None, typer.Option(help="Of several samples, this one.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All requests that these leave.")] = False,
) -> None:
    from stream_monitor.client import Monitor

    with Monitor(monitor_at) as monitor:
        gone = monitor.delete_request(
            request_id, engine_instance=engine_instance, sample_index=sample_index, every=every
        )
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
