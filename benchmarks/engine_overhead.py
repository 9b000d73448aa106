"""What the plug-in costs a user of the engine: latency, throughput, bytes and memory, against the engine without it.

Three engines live side by side and take turns, each in processes of its own: plain vLLM, vLLM with the plug-in switched
off, and vLLM with it capturing for a monitor; with `--everything` a fourth one that captures every position, layer and
head. For every context and concurrency all of them decode the same prompts, in an order that changes from round to
round; a round gives a ratio to the plain engine, a figure is the median of the rounds' ratios. Prefix caching is off,
all requests are queued before the first step and the KV caches are of one size, so that the schedules are the same:
that, and that the sampled tokens are, is checked before any time is looked at. The governor is off.

On a CPU the default is vLLM in eager mode (`--compiled` for torch.compile); on a GPU vLLM's own defaults, CUDA graphs
included. `--shape` takes a model's shape without weights: dummy weights, no tokenizer, prompts of random ids.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import Must, Report, bootstrap, run
from benchmarks.shapes import SHAPES, write_shape

STREAM_WORKER = "stream_monitor.engine.worker.StreamWorker"
EVERYTHING = {"STREAM_MONITOR_STRIDE": "1", "STREAM_MONITOR_LAYERS": "all", "STREAM_MONITOR_HEADS": "all"}
ARMS: dict[str, dict[str, str] | None] = {
    "plain": None,
    "off": {"STREAM_MONITOR_DISABLE": "1"},
    "capturing": {},
    "everything": EVERYTHING,
}
"""Settings of the plug-in; None for the engine without it."""
LEAST_CAPTURED = 0.99


@dataclass(frozen=True)
class Platform:
    """Defaults and musts of CPU or GPU.

    Attributes:
        musts: bounds of the worst cell, by arm and figure.
    """

    concurrency: tuple[int, ...]
    contexts: tuple[int, ...]
    musts: dict[str, Must]


CPU = Platform(
    (1, 4, 16),
    (128, 1024),
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
    {
        "capturing p50": ("<=", 1.01),
        "capturing p99": ("<=", 1.02),
        "off p50": ("<=", 1.005),
        "everything p50": ("<=", 1.03),
    },
)


@dataclass(frozen=True)
class Times:
    """One run in seconds: between a request's tokens, until its first one, and tokens per second of all."""

    p50: float
    p99: float
    first_token: float
    throughput: float

    @classmethod
    def of(cls, result: dict[str, Any]) -> "Times":
        gaps = sorted(b - a for stamps in result["stamps"] for a, b in pairwise(stamps))
        return cls(
            p50=statistics.median(gaps),
            p99=gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
            first_token=statistics.median(stamps[0] for stamps in result["stamps"]),
            throughput=sum(map(len, result["stamps"])) / result["seconds"],
        )


class Arm:
    """An engine in a process of its own (`benchmarks.overhead_engine`)."""

    def __init__(self, name: str, engine: dict[str, Any], environment: dict[str, str], log: Path) -> None:
        self.name, self._log = name, log
        settings = ARMS[name]
        captures = settings is not None and name != "off"
        if settings is not None:
            engine = engine | {"worker_cls": STREAM_WORKER}
        own = (
            environment
            | (settings or {})
            | {
                "STREAM_MONITOR_MAX_OVERHEAD": "0",
                "STREAM_MONITOR_ALLOW_UNTESTED_ENGINE": "1",
            }
        )
        asked = json.dumps({"engine": engine, "captures": captures})
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.overhead_engine", asked],
                env=own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self.started = self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """What the engine's method `do` returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-25:])
            raise RuntimeError(f"the engine `{self.name}` ended:\n{tail}")
        return json.loads(line)


@dataclass
class Cell:
    """One context and concurrency: what each arm's rounds gave."""

    times: dict[str, list[Times]] = field(default_factory=dict)
    accounts: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    same: bool = True

    def ratios(self, arm: str, of: Callable[[Times], float]) -> list[float]:
        """Arm over plain engine, round by round."""
        return [of(own) / of(plain) for own, plain in zip(self.times[arm], self.times["plain"], strict=True)]


def measure(arms: list[Arm], prompts: list[list[int]], new_tokens: int, rounds: int, draw: random.Random) -> Cell:
    """Every arm in every round, after one that does not count."""
    cell = Cell()
    for number in range(-1, rounds):
        results = {}
        for arm in draw.sample(arms, len(arms)):
            results[arm.name] = arm.ask("run", prompts=prompts, new_tokens=new_tokens)
        plain = results["plain"]
        cell.same &= all(result[key] == plain[key] for result in results.values() for key in ("schedule", "tokens"))
        if number >= 0:
            for name, result in results.items():
                cell.times.setdefault(name, []).append(Times.of(result))
                whole = {"seconds": result["seconds"], "tokens": sum(map(len, result["tokens"]))}
                cell.accounts.setdefault(name, []).append(result["account"] and result["account"] | whole)
    return cell


def captured_share(accounts: list[dict[str, float]]) -> float:
    """Rows captured over rows that the stride had picked."""
    picked = sum(each["expected"] - each["sampled_out"] for each in accounts)
    return sum(each["captured"] for each in accounts) / picked if picked else 0.0


def report_cell(report: Report, name: str, cell: Cell, seed: int) -> None:
    """Figures of one cell."""
    figures: dict[str, Callable[[Times], float]] = {
        "p50": lambda times: times.p50,
        "p99": lambda times: times.p99,
        "first token": lambda times: times.first_token,
        "throughput": lambda times: times.throughput,
    }
    plain = cell.times["plain"]
    report.figures[f"plain p50 seconds, {name}"] = statistics.median(times.p50 for times in plain)
    for arm in cell.times:
        if arm == "plain":
            continue
        for figure, of in figures.items():
            ratios = cell.ratios(arm, of)
            report.figures[f"{arm} {figure}, {name}"] = statistics.median(ratios)
            rounds = {str(number): [ratio] for number, ratio in enumerate(ratios)}
            report.ci[f"{arm} {figure}, {name}"] = bootstrap(rounds, seed, statistics.median)
        accounts = cell.accounts[arm]
        if accounts[0]:
            report_account(report, f"{arm}, {name}", cell.times[arm], accounts)
    shown = {arm: f"{report.figures[f'{arm} p50, {name}']:.4f}" for arm in cell.times if arm != "plain"}
    print(f"{name}: plain p50 {1e3 * report.figures[f'plain p50 seconds, {name}']:.2f} ms; ratios {shown}", flush=True)


def report_account(report: Report, name: str, times: list[Times], accounts: list[dict[str, float]]) -> None:
    """Rows, bytes, and where the time went: seconds per second of decoding, on the runner thread and beside it."""
    tokens = sum(each["tokens"] for each in accounts)
    seconds = sum(each["seconds"] for each in accounts)
    report.figures[f"captured share, {name}"] = captured_share(accounts)
    report.figures[f"row-heads captured per token, {name}"] = sum(each["captured"] for each in accounts) / tokens
    report.figures[f"bytes per token, {name}"] = sum(each["record_bytes"] for each in accounts) / tokens
    report.figures[f"search busy, {name}"] = sum(each["estimate_seconds"] for each in accounts) / seconds
    for hook in sorted(key for key in accounts[0] if key.startswith("hook: ")):
        report.figures[f"{hook}, {name}"] = sum(each.get(hook, 0.0) for each in accounts) / seconds


def worst(report: Report, prefix: str, direction: str) -> float:
    """The worst cell's figure, NaN where there is none."""
    values = [value for name, value in report.figures.items() if name.startswith(prefix + ", ")]
    return (max if direction == "<=" else min)(values) if values else float("nan")


@contextmanager
def monitor(folder: Path) -> Iterator[str]:
    """The sidecar that the capturing engines publish to; its address."""
    address = f"unix:{folder / 'ingest.sock'}"
    addresses = ["--ingest", address, "--grpc", f"unix:{folder / 'grpc.sock'}", "--http", "127.0.0.1:0"]
    with (folder / "monitor.log").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stream_monitor", "serve", *addresses], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield address
    finally:
        process.terminate()
        process.wait(30)


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a model; SmolLM2 as `make weights` puts it.")] = None,
    shape: Annotated[str, typer.Option(help="Instead of a model: " + ", ".join(SHAPES))] = "",
    concurrency: Annotated[list[int] | None, typer.Option()] = None,
    context: Annotated[list[int] | None, typer.Option(help="Prompt tokens.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each request decodes.")] = 64,
    rounds: int = 5,
    everything: Annotated[bool, typer.Option(help="Also an engine that captures all there is.")] = False,
    compiled: Annotated[bool, typer.Option(help="On a CPU: torch.compile, as vLLM does by default.")] = False,
    dtype: str = "auto",
    gpu_memory: Annotated[float, typer.Option(help="Part of the GPU's memory for each engine.")] = 0.3,
    backend: Annotated[str, typer.Option(help="Attention backend; vLLM's own choice by default.")] = "",
    seed: int = 0,
) -> None:
    """Compare engines with and without the plug-in."""
    import torch

    platform = GPU if torch.cuda.is_available() else CPU
    if shape and shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape}: valid: {', '.join(SHAPES)}")
    if new_tokens < 3 or rounds < 1:
        raise typer.BadParameter("--new-tokens must be at least 3 and --rounds at least 1")
    sizes, contexts = concurrency or list(platform.concurrency), context or list(platform.contexts)
    names = [name for name in ARMS if everything or name != "everything"]
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
        arms = []
        for arm in names:
            arms.append(Arm(arm, engine, environment, folder / f"{arm}.log"))
            stack.callback(arms[-1].stop)
            print(f"engine `{arm}` is up after {arms[-1].started['start_seconds']:.0f} s", flush=True)
        config = {
            "model": shape or Path(source).name,
            "engine": {key: value for key, value in engine.items() if key != "model"},
            "concurrency": sizes,
            "contexts": contexts,
            "new_tokens": new_tokens,
            "arms": {arm: ARMS[arm] for arm in names},
        }
        report = Report("engine_overhead", config, seed, rounds)
        draw = random.Random(seed)
        same = True
        for tokens in contexts:
            for size in sizes:
                prompts = [[draw.randrange(2, vocabulary) for _ in range(tokens)] for _ in range(size)]
                cell = measure(arms, prompts, new_tokens, rounds, draw)
                same &= cell.same
                report_cell(report, f"context {tokens}, concurrency {size}", cell, seed)
        finish(report, platform, arms, same)


def engine_arguments(
    source: str,
    dummy: bool,
    longest: int,
    requests: int,
    dtype: str,
    gpu_memory: float,
    compiled: bool,
    backend: str,
    seed: int,
) -> dict[str, Any]:
    """What all arms are started with."""
    import torch

    arguments: dict[str, Any] = {
        "model": source,
        "dtype": dtype,
        "max_model_len": longest + 1,
        "max_num_seqs": requests,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": dummy,
        "seed": seed,
    }
    if dummy:
        arguments |= {"load_format": "dummy", "generation_config": "vllm"}
    if torch.cuda.is_available():
        arguments["gpu_memory_utilization"] = gpu_memory
        # One size for all: else the memory of block summaries would change the schedule.
        arguments["num_gpu_blocks_override"] = 1 + requests * -(-(longest + 1) // 16)
        arguments["block_size"] = 16
        if backend:
            arguments["attention_config"] = {"backend": backend}
    else:
        # As in a server; vLLM would else put the worker into the process of the core, where its threads are not bound.
        arguments["distributed_executor_backend"] = "mp"
        arguments["enforce_eager"] = not compiled
        arguments["block_size"] = 32
        arguments["num_gpu_blocks_override"] = 1 + requests * -(-(longest + 1) // 32)
    return arguments


def finish(report: Report, platform: Platform, arms: list[Arm], same: bool) -> None:
    """What concerns all cells, the musts, and the JSON line."""
    memory = {arm.name: arm.ask("memory") for arm in arms}
    counts = {arm.name: arm.ask("compilations") for arm in arms}
    for arm in arms:
        if arm.name != "plain":
            for kind, value in memory[arm.name].items():
                report.figures[f"extra {kind}, {arm.name}"] = value - memory["plain"][kind]
    kinds = ("num_graphs_seen", "num_cudagraph_captured", "num_backend_compilations", "num_piecewise_graphs_seen")
    equal = all(counts[arm.name].get(kind) == counts["plain"].get(kind) for arm in arms for kind in kinds)
    report.figures["same schedules and tokens"] = float(same)
    report.figures["same graphs and compilations"] = float(equal)
    report.figures["captured share"] = min(
        (value for name, value in report.figures.items() if name.startswith("captured share, ")), default=0.0
    )
    for name, must in platform.musts.items():
        if any(name.split(" ")[0] == arm.name for arm in arms):
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
