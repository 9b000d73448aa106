"""Memory and time of a whole trace, with attention restricted to the kept blocks, as the context grows.

Each length runs in a process of its own, over code; positions beyond the model's training are fine here. Growth is
per doubling of the context. What the trace takes beside the loaded model is told apart; at a few thousand tokens it
is buffers and threads rather than the context.
"""

import math
import multiprocessing
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.attention import load_tokenizer
from benchmarks.report import Report, run
from benchmarks.texts import token_ids
from stream_kernels.search import STRATEGIES, SearchConfig

LENGTHS, FULL_LENGTHS = (2**11, 2**12, 2**13), (2**13, 2**15, 2**17)
WARM_UP = 2**10
"""Tokens of a trace that is not measured: the first one on a machine compiles the search, and keeps it in a file."""
MEMORY_GROWTH, TIME_GROWTH = 2.1, 2.3
MOST_GIB = 24.0


@dataclass(frozen=True)
class Cost:
    """Of one trace: seconds of the pass, and bytes of resident memory before it and at its most."""

    seconds: float
    loaded: int
    peak: int


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")],
    length: Annotated[list[int] | None, typer.Option(help="Tokens, ascending; may be repeated.")] = None,
    strategy: Annotated[str, typer.Option(help=f"One of {', '.join(STRATEGIES)}.")] = "beam",
    top_k: Annotated[int, typer.Option(help="Blocks kept per head.")] = SearchConfig().top_k,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 2,
    seed: Annotated[int, typer.Option(help="Where the code begins.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="8k, 32k and 128k tokens: 25 minutes on two cores.")] = False,
) -> None:
    """Peak memory and time of a trace."""
    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} is not the folder of a model")
    try:
        search = SearchConfig.for_prompt(strategy=strategy, top_k=top_k)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    lengths = sorted(length or (FULL_LENGTHS if full else LENGTHS))
    report = Report(
        benchmark="trace_memory",
        config={
            "model": model.name,
            "strategy": strategy,
            "top_k": top_k,
            "width": search.width,
            "min_gain": search.min_gain,
            "attention": "pruned",
            "threads": threads,
            "lengths": lengths,
            "full": full,
        },
        seed=seed,
        n=1,
    )
    tokenizer = load_tokenizer(model)
    print(f"{'tokens':>9}{'seconds':>10}{'tokens/s':>10}{'model':>11}{'peak':>11}{'of the trace':>14}", flush=True)
    costs = {}
    for tokens in (WARM_UP, *lengths):
        ids = token_ids(tokenizer, "code", tokens, seed)
        # A process of its own, since memory that was freed is not all given back.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cost = pool.apply(_trace, (model, ids, search, threads))
        if tokens not in lengths:
            continue
        costs[tokens] = cost
        print(
            f"{tokens:>9,}{cost.seconds:>10.1f}{tokens / cost.seconds:>10,.0f}{_gib(cost.loaded):>7.2f} GiB"
            f"{_gib(cost.peak):>7.2f} GiB{_gib(cost.peak - cost.loaded):>10.3f} GiB",
            flush=True,
        )
        report.figures |= {
            f"seconds/{tokens}": cost.seconds,
            f"peak_gib/{tokens}": _gib(cost.peak),
            f"trace_gib/{tokens}": _gib(cost.peak - cost.loaded),
        }
        report.must[f"peak_gib/{tokens}"] = ("<=", MOST_GIB)
    for less, more in pairwise(lengths):
        doublings = math.log2(more / less)
        memory, seconds = costs[more].peak / costs[less].peak, costs[more].seconds / costs[less].seconds
        for name, ratio, most in (("memory", memory, MEMORY_GROWTH), ("time", seconds, TIME_GROWTH)):
            key = f"{name}_per_doubling/{less}-{more}"
            report.figures[key] = ratio ** (1 / doublings)
            report.must[key] = ("<=", most)
            print(f"{name} per doubling, {less:,} to {more:,}: {report.figures[key]:.2f}x (at most {most}x)")
    report.finish()


def _trace(model: Path, ids: list[int], search: SearchConfig, threads: int) -> Cost:
    import torch

    from stream_monitor.tracing.layer import TraceOptions
    from stream_monitor.tracing.model import load
    from stream_monitor.tracing.trace import trace

    torch.set_num_threads(threads)
    traced = load(str(model))
    # Forgets the peak of loading, in which the weights are there twice (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    loaded = _memory("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        done = trace(traced, ids, TraceOptions(search), Path(folder) / "trace")
    return Cost(done.seconds, loaded, _memory("VmHWM"))


def _memory(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(name + ":"))
    return int(value) * 1024


def _gib(size: int) -> float:
    return size / 2**30


if __name__ == "__main__":
    run(main)
