"""What the plug-in costs a user of the engine: latency, throughput, bytes and memory, against the engine without it.

Three engines live side by side and take turns, each in processes of its own: plain vLLM, vLLM with the plug-in switched
off, and vLLM with it capturing for a monitor; with `--everything` a fourth one that captures every position, layer and
head. For every context and concurrency all of them decode the same prompts, in an order that changes from round to
round; a round gives a ratio to the plain engine. Where a process's memory happens to lie makes one engine some percent
faster than the next for as long as both live, most often the one that was started last; in huge pages, which all ask
for, less so. So the engines are started anew as often as there are arms, each arm once in every place of the order; a
figure is the mean of the starts' medians, its interval is of starts. A capturing engine also runs with its capture
paused: its ratio to itself (`over itself paused`) is free of where memory lies. Prefix caching is off, all requests are
queued before the first step and the KV caches are of one size, so that the schedules are the same: that, and that the
sampled tokens are, is checked before any time is looked at. The governor is off.

On a CPU the default is vLLM in eager mode (`--compiled` for torch.compile); on a GPU vLLM's own defaults, CUDA graphs
included. `--shape` takes a model's shape without weights: dummy weights, no tokenizer, prompts of random ids.
"""

import json
import os
import random
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.engine_overhead.arms import ARMS, Arm, engine_arguments, monitor
from benchmarks.engine_overhead.cells import Cell, print_start, report_cell
from benchmarks.engine_process import EngineEnded
from benchmarks.report import Must, Report, run
from benchmarks.shapes import SHAPES, write_shape

LEAST_CAPTURED = 0.99
HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
"""For all engines alike: where two equal ones differ by three percent with weights in pages of 4 KiB, which lie well or
badly in the caches, it is one in pages of 2 MiB. What is set already, or a kernel that gives none, stands."""
_COUNTS = ("num_graphs_seen", "num_cudagraph_captured", "num_backend_compilations", "num_piecewise_graphs_seen")


@dataclass(frozen=True)
class Platform:
    """Defaults and musts of CPU or GPU.

    Attributes:
        full_contexts: those of `--full`.
        musts: bounds of the worst cell, by arm and figure.
    """

    concurrency: tuple[int, ...]
    contexts: tuple[int, ...]
    full_contexts: tuple[int, ...]
    musts: dict[str, Must]


CPU = Platform(
    (1, 4, 16),
    (128, 512),
    (128, 2048),
    {
        "capturing p50": ("<=", 1.02),
        "capturing throughput": (">=", 0.98),
        "off p50": ("<=", 1.005),
        "everything p50": ("<=", 1.10),
    },
)
GPU = Platform(
    (1, 8, 32, 128),
    (512, 8192),
    (512, 8192),
    {
        "capturing p50": ("<=", 1.01),
        "capturing p99": ("<=", 1.02),
        "off p50": ("<=", 1.005),
        "everything p50": ("<=", 1.03),
    },
)


@dataclass
class Race:
    """What all starts of the engines gave.

    Attributes:
        cells: by context and concurrency.
        memory: bytes beyond the plain engine's, by arm and kind, of each start.
        same_graphs: whether every arm compiled and captured as much as the plain engine, each time.
    """

    cells: dict[tuple[int, int], Cell]
    memory: dict[str, list[float]] = field(default_factory=dict)
    same_graphs: bool = True

    def take_in(self, arms: list[Arm]) -> None:
        """Ask engines that are about to end."""
        memory = {arm.name: arm.ask("memory") for arm in arms}
        counts = {arm.name: arm.ask("compilations") for arm in arms}
        self.same_graphs &= all(
            counts[arm.name].get(kind) == counts["plain"].get(kind) for arm in arms for kind in _COUNTS
        )
        for arm in arms:
            for kind, value in memory[arm.name].items():
                if arm.name != "plain":
                    self.memory.setdefault(f"extra {kind}, {arm.name}", []).append(value - memory["plain"][kind])


def worst(report: Report, prefix: str, direction: str) -> float:
    """The worst cell's figure, NaN where there is none."""
    values = [value for name, value in report.figures.items() if name.startswith(prefix + ", ")]
    return (max if direction == "<=" else min)(values) if values else float("nan")


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a model; SmolLM2 as `make weights` puts it.")] = None,
    shape: Annotated[str, typer.Option(help="Instead of a model: " + ", ".join(SHAPES))] = "",
    concurrency: Annotated[list[int] | None, typer.Option()] = None,
    context: Annotated[list[int] | None, typer.Option(help="Prompt tokens.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each request decodes.", min=3)] = 48,
    starts: Annotated[
        int | None, typer.Option(help="How often the engines are started; once per arm by default.", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Of each start, after one that does not count.", min=1)] = 2,
    everything: Annotated[bool, typer.Option(help="Also an engine that captures all there is.")] = False,
    compiled: Annotated[bool, typer.Option(help="On a CPU: torch.compile, as vLLM does by default.")] = False,
    dtype: str = "auto",
    gpu_memory: Annotated[float, typer.Option(help="Part of the GPU's memory for each engine.")] = 0.3,
    backend: Annotated[str, typer.Option(help="Attention backend; vLLM's own choice by default.")] = "",
    full: Annotated[bool, typer.Option(help="Longer contexts, 10 rounds, twice as many starts.")] = False,
    seed: int = 0,
) -> None:
    """Compare engines with and without the plug-in."""
    import torch

    platform = GPU if torch.cuda.is_available() else CPU
    if shape and shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape}: valid: {', '.join(SHAPES)}")
    sizes = concurrency or list(platform.concurrency)
    contexts = context or list(platform.full_contexts if full else platform.contexts)
    names = [name for name in ARMS if everything or name != "everything"]
    starts = starts or (2 if full else 1) * len(names)
    rounds = 10 if full else rounds
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        longest = max(contexts) + new_tokens
        source = write_shape(folder, shape, longest + 64) if shape else str(model or ".cache/models/smollm2")
        if not shape and not Path(source, "config.json").exists():
            raise typer.BadParameter(f"--model {source}: no config.json there; `make weights` fetches SmolLM2")
        vocabulary = json.loads(Path(source, "config.json").read_text())["vocab_size"]
        engine = engine_arguments(source, bool(shape), longest, max(sizes), dtype, gpu_memory, compiled, backend, seed)
        address = stack.enter_context(monitor(folder))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAM_MONITOR_")}
        environment |= {"STREAM_MONITOR_TARGET": address, "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        environment.setdefault(*HUGE_PAGES)
        config = {
            "model": shape or Path(source).name,
            "engine": {key: value for key, value in engine.items() if key != "model"},
            "concurrency": sizes,
            "contexts": contexts,
            "new_tokens": new_tokens,
            "starts": starts,
            "rounds": rounds,
            "arms": {arm: ARMS[arm] for arm in names},
            HUGE_PAGES[0]: environment[HUGE_PAGES[0]],
        }
        draw = random.Random(seed)
        race = Race({(tokens, size): Cell() for tokens in contexts for size in sizes})
        order = draw.sample(names, len(names))
        for start in range(starts):
            # Turned on by one, so that each arm is started first, second, ... equally often: the last is the fastest.
            turned = order[start % len(order) :] + order[: start % len(order)]
            run_once(race, turned, engine, environment, folder, vocabulary, new_tokens, rounds, draw)
    report = Report("engine_overhead", config, seed, starts * rounds)
    finish(report, platform, race, names, seed)


def cell_name(tokens: int, size: int) -> str:
    """As its figures say it."""
    return f"context {tokens}, concurrency {size}"


def run_once(
    race: Race,
    names: list[str],
    engine: dict[str, Any],
    environment: dict[str, str],
    folder: Path,
    vocabulary: int,
    new_tokens: int,
    rounds: int,
    draw: random.Random,
) -> None:
    """Start the engines in this order, let them run every cell, end them."""
    with ExitStack() as stack:
        try:
            arms = []
            for name in names:
                arms.append(Arm(name, engine, environment, folder / f"{name}.log"))
                stack.callback(arms[-1].stop)
                print(f"engine `{name}` is up after {arms[-1].started['start_seconds']:.0f} s", flush=True)
            for (tokens, size), cell in race.cells.items():
                prompts = [[draw.randrange(2, vocabulary) for _ in range(tokens)] for _ in range(size)]
                cell.measure(arms, prompts, new_tokens, rounds, draw)
                print_start(cell_name(tokens, size), cell)
            race.take_in(arms)
        except EngineEnded as ended:
            print(ended, flush=True)  # before the others are stopped, which may take minutes
            raise


def finish(report: Report, platform: Platform, race: Race, names: list[str], seed: int) -> None:
    """The figures, the musts, and the JSON line."""
    for (tokens, size), cell in race.cells.items():
        report_cell(report, cell_name(tokens, size), cell, seed)
    report.figures |= {name: sorted(values)[len(values) // 2] for name, values in race.memory.items()}
    report.figures["same schedules and tokens"] = float(all(cell.same for cell in race.cells.values()))
    report.figures["same graphs and compilations"] = float(race.same_graphs)
    report.figures["captured share"] = min(
        (value for name, value in report.figures.items() if name.startswith("captured share, ")), default=0.0
    )
    for name, must in platform.musts.items():
        if name.split(" ")[0] in names:
            report.figures[name] = worst(report, name, must[0])
            report.must[name] = must
    report.must |= {
        "same schedules and tokens": (">=", 1.0),
        "same graphs and compilations": (">=", 1.0),
        "captured share": (">=", LEAST_CAPTURED),
    }
    report.finish()


if __name__ == "__main__":
    run(main)
