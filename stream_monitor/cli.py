"""The command `stream-monitor`. Every command imports what it needs when it runs, so that `--help` is quick."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from stream_monitor import cli_monitor
from stream_monitor.cli_fail import fail as _fail
from stream_monitor.interrupts import end_as_at_ctrl_c

if TYPE_CHECKING:
    from stream_monitor.config import OnStream
    from stream_monitor.monitor.run import Server

S = TypeVar("S", bound="OnStream")

DISTRIBUTION = "stream-monitor"

app = typer.Typer(
    name="stream-monitor",
    help="See what a reasoning model's chain of thought rests on, while vLLM serves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Commands that ask a running monitor, or read what it left.
app.add_typer(cli_monitor.app)


def main() -> None:
    """Entry point of the console script."""
    app()


def _version() -> str:
    from importlib.metadata import version

    return version(DISTRIBUTION)


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


def _settings(table: "type[S]", arguments: list[str]) -> "S":
    """Settings of one table from `--some-key value`, `--some-key=value` and bare `--flag` arguments."""
    from stream_monitor.config import SettingsError, load

    fields = table.model_fields
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
        return load(table, **values)
    except SettingsError as error:
        _fail(error)


def _settings_help(what: str, table: "type[S]") -> str:
    """The settings as options, straight from the settings model."""
    from stream_monitor.config import listed

    lines = [f"{what} Options (also STREAM_MONITOR_* and a file):\n"]
    for name, field in listed(table):
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
    from stream_monitor.config import MonitorSettings

    if "--help" in context.args:
        typer.echo(_settings_help("Run the monitor until SIGTERM or SIGINT.", MonitorSettings))
        return
    settings = _settings(MonitorSettings, context.args)
    _quiet_grpc()
    with _compiling():
        from stream_monitor.monitor.server import MonitorServer
    _run(lambda: MonitorServer(settings, _version()))


@app.command(
    context_settings=_PASS_THROUGH | {"help_option_names": []},
    short_help="Run a process that answers for all monitors of a stream; `fleet --help` lists the settings.",
)
def fleet(context: typer.Context) -> None:
    """Run one of the interchangeable processes of a fleet."""
    from stream_monitor.config import FleetSettings, SettingsError

    if "--help" in context.args:
        typer.echo(_settings_help("Answer for all monitors of a stream until SIGTERM or SIGINT.", FleetSettings))
        return
    settings = _settings(FleetSettings, context.args)
    _quiet_grpc()
    try:
        with _compiling():
            from stream_monitor.monitor.fleet.server import FleetServer
    except SettingsError as error:
        _fail(error)
    _run(lambda: FleetServer(settings, _version()))


def _quiet_grpc() -> None:
    """Before gRPC is loaded: it says a line for each handshake that fails, with which anybody could fill the log."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@contextmanager
def _compiling() -> Iterator[None]:
    """While what has compiled loops is imported: where that is forbidden it is said in one line."""
    try:
        yield
    except PermissionError as error:
        if "executable memory" not in str(error):
            raise
        _fail(
            "this process may not make memory executable, which the monitor's compiled loops need; allow it "
            "(systemd: MemoryDenyWriteExecute=no)"
        )


def _run(make: "Callable[[], Server]") -> None:
    """A server until a signal; what keeps it from serving as one line."""
    from stream_monitor.anchors.profile import ProfileError
    from stream_monitor.config import SettingsError
    from stream_monitor.monitor.access.book import AccessError
    from stream_monitor.monitor.access.certificates import TlsError
    from stream_monitor.monitor.database_file import StoreRefused
    from stream_monitor.monitor.listen import ListenError
    from stream_monitor.monitor.run import serve as run
    from stream_monitor.monitor.text import TextError

    try:
        asyncio.run(run(make))
    except (AccessError, ListenError, ProfileError, SettingsError, StoreRefused, TextError, TlsError) as error:
        _fail(error)


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
        search = SearchConfig.for_prompt(
            strategy=strategy,
            top_k=top_k,
            block_size=block_size,
            sink_blocks=sink_blocks,
            recent_blocks=recent_blocks,
        )
    except ValueError as error:
        _fail(error)
    try:
        end_as_at_ctrl_c()
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
