"""The command `stream-monitor`. Every command imports what it needs when it runs, so that `--help` is quick."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from stream_monitor.config import MonitorSettings

DISTRIBUTION = "stream-monitor"

app = typer.Typer(
    name="stream-monitor",
    help="See what a reasoning model's chain of thought rests on, while vLLM serves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the console script."""
    app()


def _version() -> str:
    from importlib.metadata import version

    return version(DISTRIBUTION)


def _fail(message: object) -> NoReturn:
    """One line on standard error, exit status 2."""
    typer.echo(f"stream-monitor: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stream-monitor {_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _settings(arguments: list[str]) -> "MonitorSettings":
    """MonitorSettings from `--some-key value`, `--some-key=value` and bare `--flag` arguments."""
    from stream_monitor.config import MonitorSettings, SettingsError, load

    fields = MonitorSettings.model_fields
    values: dict[str, Any] = {}
    waiting = list(arguments)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or key not in fields:
            valid = ", ".join("--" + name.replace("_", "-") for name in sorted(fields))
            _fail(f"{flag}: no such option; valid: {valid}")
        if not equals:
            if fields[key].annotation is bool:
                value = "true"
            elif waiting:
                value = waiting.pop(0)
            else:
                _fail(f"{flag}: needs a value; {fields[key].description}")
        values[key] = value
    try:
        return load(MonitorSettings, **values)
    except SettingsError as error:
        _fail(error)


def _serve_help() -> str:
    """The settings as options, straight from the settings model."""
    from stream_monitor.config import MonitorSettings

    lines = ["Run the monitor until SIGTERM or SIGINT. Options (also STREAM_MONITOR_* and a file):\n"]
    for name, field in MonitorSettings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        lines.append(f"--{name.replace('_', '-')}  {field.description}  [default: {default}]\n")
    return "\n".join(lines)


_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(
    context_settings=_PASS_THROUGH | {"help_option_names": []},
    short_help="Run the monitor until SIGTERM or SIGINT; `serve --help` lists the settings.",
)
def serve(context: typer.Context) -> None:
    """Run the monitor."""
    if "--help" in context.args:
        typer.echo(_serve_help())
        return
    settings = _settings(context.args)
    from stream_monitor.anchors.profile import ProfileError
    from stream_monitor.monitor.database_file import StoreRefused
    from stream_monitor.monitor.listen import ListenError
    from stream_monitor.monitor.run import serve as run
    from stream_monitor.monitor.text import TextError

    try:
        asyncio.run(run(settings, _version()))
    except (ListenError, ProfileError, StoreRefused, TextError) as error:
        _fail(error)


@app.command(help="Follow requests and events: a live table, or with --json one event per line.")
def watch(
    target: Annotated[str, typer.Option(help="Address of the monitor: host:port or unix:/path.")] = "127.0.0.1:9750",
    json: Annotated[bool, typer.Option("--json", help="One JSON event per line.")] = False,
    request: Annotated[
        list[str] | None, typer.Option(help="Only this request, by internal or external id; may be repeated.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only events of this kind, such as anchor_shift; may be repeated.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Progress events too, not findings alone.")] = False,
) -> None:
    from stream_monitor.client import MonitorError
    from stream_monitor.monitor import watch as watching

    _check_target(target)
    try:
        kinds = watching.kinds(kind or [], everything)
    except ValueError as error:
        _fail(f"--kind: {error}")
    try:
        asyncio.run(watching.follow(target, request or [], kinds, json))
    except KeyboardInterrupt:
        return
    except BrokenPipeError:
        # Whoever read us (such as head) has enough.
        sys.stdout = None
    except MonitorError as error:
        _fail(error)


@app.command(help="Print one request's anchor curve and findings, and what one of its findings rests on.")
def explain(
    request_id: Annotated[str, typer.Argument(help="Internal or external id of the request.")],
    number: Annotated[int | None, typer.Argument(help="Number of the finding, from 1.")] = None,
    target: Annotated[str, typer.Option(help="Address of the monitor: host:port or unix:/path.")] = "127.0.0.1:9750",
) -> None:
    from rich.console import Console

    from stream_monitor.client import MonitorError
    from stream_monitor.monitor.explain import NoSuchFinding
    from stream_monitor.monitor.explain import explain as run

    _check_target(target)
    try:
        run(target, request_id, number, Console())
    except (MonitorError, NoSuchFinding) as error:
        _fail(error)


@app.command(help="Make a profile, from the requests a monitor holds, so that findings have a known false-alarm rate.")
def calibrate(
    out: Annotated[Path, typer.Option(help="File to write; name it to the monitor with --profiles.")],
    target: Annotated[str, typer.Option(help="Address of the monitor: host:port or unix:/path.")] = "127.0.0.1:9750",
    model_name: Annotated[str, typer.Option(help="Model whose requests to take.")] = "",
    trim: Annotated[
        float, typer.Option(help="Share of the requests whose highest scores are left out: 0 for traffic known clean.")
    ] = 0.01,
) -> None:
    from stream_monitor.anchors.profile import ProfileError
    from stream_monitor.client import MonitorError
    from stream_monitor.monitor.calibrate import calibrate as run

    _check_target(target)
    try:
        typer.echo(run(target, out, model_name, trim))
    except (MonitorError, ProfileError) as error:
        _fail(error)


@app.command(help="Remove a request from a monitor's memory and store for good.")
def delete(
    request_id: Annotated[str, typer.Argument(help="Internal or external id of the request.")],
    engine_instance: Annotated[str, typer.Option(help="Of several requests with the id, the one of this engine.")] = "",
    sample_index: Annotated[int | None, typer.Option(help="Of several samples, this one.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All requests that these leave.")] = False,
    target: Annotated[str, typer.Option(help="Address of the monitor: host:port or unix:/path.")] = "127.0.0.1:9750",
) -> None:
    from stream_monitor.client import Monitor, MonitorError

    _check_target(target)
    try:
        with Monitor(target) as monitor:
            gone = monitor.delete_request(
                request_id, engine_instance=engine_instance, sample_index=sample_index, every=every
            )
    except MonitorError as error:
        _fail(error)
    for key in gone:
        typer.echo(f"deleted {key.request_id} of engine {key.engine_instance}")


@app.command(help="Write the events and traces of a monitor's store to files, whether the monitor runs or not.")
def export(
    format: Annotated[str, typer.Option(help="parquet or jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for the files; new, or empty.")],
    store: Annotated[str | None, typer.Option(help="File of the store; the monitor's own by default.")] = None,
    since: Annotated[str, typer.Option(help="From this time on, such as 2026-11-26 or 2026-11-26T07:00+01:00.")] = "",
    until: Annotated[str, typer.Option(help="Up to this time.")] = "",
    model_name: Annotated[str, typer.Option("--model", help="Of this model alone.")] = "",
) -> None:
    from stream_monitor.config import MonitorSettings, SettingsError, load
    from stream_monitor.monitor.export import ExportError
    from stream_monitor.monitor.export import export as run

    try:
        path = load(MonitorSettings, store=store).store
        typer.echo(run(path, out, format, since, until, model_name))
    except (SettingsError, ExportError) as error:
        _fail(error)


def _check_target(target: str) -> None:
    from stream_monitor.config import check_address

    try:
        check_address(target)
    except ValueError as error:
        _fail(f"--target: {error} (got {target!r})")


@app.command(
    context_settings=_PASS_THROUGH | {"help_option_names": []},
    help="Serve MODEL with vLLM and this plug-in; all flags are vLLM's.",
)
def vllm(context: typer.Context, model: Annotated[str, typer.Argument(help="Model name or folder.")]) -> None:
    from stream_monitor.engine.launch import main as launch

    raise typer.Exit(launch(model, context.args) or 0)


@app.command(
    help="Print what would be captured of MODEL, and why a layer is refused; exits 1 if nothing can be captured.",
)
def doctor(model: Annotated[str, typer.Argument(help="Model name or folder.")]) -> None:
    from stream_monitor.engine.doctor import main as diagnose

    raise typer.Exit(diagnose(model))


@app.command(help="Trace one long context offline: which key blocks each layer and head of MODEL reads.")
def trace(
    model: Annotated[str, typer.Option(help="Folder of a Hugging Face model, or its name.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; new, or empty.")],
    prompt: Annotated[Path | None, typer.Option(help="Text file with the context.")] = None,
    messages: Annotated[
        Path | None, typer.Option(help="JSON file with chat messages, each with role and content.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="descent, beam or exact.")] = "beam",
    top_k: Annotated[int, typer.Option(help="Blocks kept per head, forced ones aside.")] = 8,
    block_size: Annotated[int, typer.Option(help="Tokens per block, of queries and of keys.")] = 32,
    sink_blocks: Annotated[int, typer.Option(help="First blocks, always kept.")] = 1,
    recent_blocks: Annotated[int, typer.Option(help="Last blocks, always kept.")] = 2,
    attention: Annotated[
        str, typer.Option(help="What the next layer sees: attention to the kept blocks (pruned), or to all (dense).")
    ] = "pruned",
    reduction: Annotated[
        str,
        typer.Option(
            help="Which blocks a block of queries keeps: by its rows' largest share (max), by their mean "
            "share (mean), or what each row keeps for itself, at most four times as many (union)."
        ),
    ] = "max",
    needle: Annotated[
        str | None, typer.Option(help="Text in the context: the report shows its routes to the answer.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Folder of another trace with a needle, to compare the routes with.")
    ] = None,
) -> None:
    if (prompt is None) == (messages is None):
        _fail("give either --prompt or --messages")
    if attention not in ("pruned", "dense"):
        _fail(f"--attention is {attention!r}; valid: pruned, dense")
    if reduction not in ("max", "mean", "union"):
        _fail(f"--reduction is {reduction!r}; valid: max, mean, union")
    if against is not None and needle is None:
        _fail("--against compares routes from a needle: name it with --needle")
    try:
        from stream_kernels.search import SearchConfig
        from stream_monitor.tracing.command import run
        from stream_monitor.tracing.errors import TracingError
        from stream_monitor.tracing.layer import TraceOptions
    except ImportError as error:
        _fail(f"tracing needs more than is installed, {error.name}: pip install 'stream-monitor[trace]'")
    try:
        search = SearchConfig(
            strategy=strategy,  # type: ignore[arg-type]  # checked by SearchConfig
            top_k=top_k,
            block_size=block_size,
            sink_blocks=sink_blocks,
            recent_blocks=recent_blocks,
        )
    except ValueError as error:
        _fail(error)
    try:
        options = TraceOptions(search, attention, reduction)  # type: ignore[arg-type]  # checked above
        run(model, prompt, messages, out, options, needle, against)
    except TracingError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written")


@app.command(help="Test whether the anchors that attention shows matter to MODEL: hide them, and see what changes.")
def validate(
    model: Annotated[str, typer.Option(help="Folder of a Hugging Face model, or its name.")],
    texts: Annotated[
        Path | None, typer.Option(help="JSON lines with the strings prompt and reasoning; there is no default.")
    ] = None,
    count: Annotated[int, typer.Option(help="Most texts that are read, evenly from the file.")] = 16,
    tokens: Annotated[int, typer.Option(help="Longest part of a text that is read.")] = 1_500,
) -> None:
    if texts is None:
        _fail("--texts is missing: a file of reasoning like that of your traffic, JSON lines with prompt and reasoning")
    if count < 2:
        _fail(f"--count is {count}; valid: 2 or more")
    if tokens < 1:
        _fail(f"--tokens is {tokens}; valid: 1 or more")
    try:
        from stream_monitor.tracing.errors import TracingError
        from stream_monitor.tracing.validation import run
    except ImportError as error:
        _fail(f"validation needs more than is installed, {error.name}: pip install 'stream-monitor[trace]'")
    try:
        run(model, texts, count, tokens)
    except TracingError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail("interrupted")
