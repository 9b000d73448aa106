"""The command `stream-monitor trace`: checks what it is given, shows progress, says what came out."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stream_monitor.tracing.folder import check_free
from stream_monitor.tracing.layer import TraceOptions
from stream_monitor.tracing.model import TracedModel, load, read_messages, read_prompt
from stream_monitor.tracing.report_writer import REPORT, ReportWriter
from stream_monitor.tracing.trace import Progress as Step
from stream_monitor.tracing.trace import Trace, trace

LINE_SECONDS = 30.0
"""How often a line says how far it is, where no bar can move: standard error is no terminal, as under nohup."""


def run(
    model_name: str,
    prompt: Path | None,
    messages: Path | None,
    out: Path,
    options: TraceOptions,
    needle: str | None = None,
    against: Path | None = None,
) -> None:
    """Traces one context into the folder `out`; exactly one of `prompt` and `messages` is given.

    `needle` is a text in the context whose routes to the answer the report shows; `against` the folder of another
    trace, whose routes these are compared with.

    Raises:
        TracingError: something that was given cannot be used.
    """
    check_free(out)
    text = None if prompt is None else read_prompt(prompt)
    chat = None if messages is None else read_messages(messages)
    console = Console(stderr=True)
    with console.status(f"loading {model_name}"):
        model = load(model_name)
    ids = model.prompt_tokens(text) if text is not None else model.chat_tokens(chat or [])
    report = ReportWriter(model, ids, options.search.block_size, needle, against)
    print(_summary(_with_progress(model, ids, options, out, console, report)))


def _with_progress(
    model: TracedModel, ids: list[int], options: TraceOptions, out: Path, console: Console, report: ReportWriter
) -> Trace:
    """`trace` with a progress bar of layers, tokens per second and memory; with lines of these where none can move."""
    columns = (
        TextColumn("layer {task.completed:.0f} of {task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=model.layers, pace="")
        told = time.monotonic()

        def show(step: Step) -> None:
            nonlocal told
            pace = f"{step.tokens_per_second:,.0f} tokens/s, {_gib(step.peak_bytes)}"
            bar.update(task, completed=step.layer, pace=pace)
            if not console.is_interactive and time.monotonic() - told >= LINE_SECONDS:
                told = time.monotonic()
                console.print(f"layer {step.layer} of {model.layers}, {pace}", highlight=False)

        return trace(model, ids, options, out, show, report)


def _summary(done: Trace) -> str:
    lines = [
        f"{done.tokens:,} tokens in {done.seconds:,.1f} s, at most {_gib(done.peak_bytes)} of memory",
        f"pruned: {done.pairs.pruned_of_causal:.1%} of the causal blocks, {done.pairs.pruned_of_square:.1%} of the "
        "full square; forced blocks count as kept",
    ]
    if done.windows:
        shortest, longest = min(done.windows.values()), max(done.windows.values())
        size = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
        lines.append(f"{len(done.windows)} layers see a sliding window of {size} tokens: masks lie inside it")
    lines += [f"next token: {done.next_token!r}", f"masks and figures are in {done.out}; open {done.out / REPORT}"]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
