"""One context and concurrency: what each engine's rounds gave, and the figures of it."""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from benchmarks.engine_overhead.arms import Arm
from benchmarks.report import Report, bootstrap


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


@dataclass
class Cell:
    """What each arm's rounds gave.

    Attributes:
        times, accounts: by arm, in the order of the rounds; an account is empty without a capture.
        starts: which start of the engines each round belongs to.
        same: whether schedules and tokens were the plain engine's in every round.
    """

    times: dict[str, list[Times]] = field(default_factory=dict)
    accounts: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    same: bool = True

    def measure(
        self,
        arms: Sequence[Arm],
        prompts: list[list[int]],
        new_tokens: int,
        rounds: int,
        draw: random.Random,
    ) -> None:
        """Every arm in every round, after one that does not count; the arms have just been started."""
        start = self.starts[-1] + 1 if self.starts else 0
        for number in range(-1, rounds):
            results = {}
            for arm in draw.sample(arms, len(arms)):
                results[arm.name] = arm.ask("run", prompts=prompts, new_tokens=new_tokens)
            plain = results["plain"]
            self.same &= all(result[key] == plain[key] for result in results.values() for key in ("schedule", "tokens"))
            if number < 0:
                continue
            self.starts.append(start)
            for name, result in results.items():
                self.times.setdefault(name, []).append(Times.of(result))
                whole = {"seconds": result["seconds"], "tokens": sum(map(len, result["tokens"]))}
                self.accounts.setdefault(name, []).append(result["account"] and result["account"] | whole)

    def ratios(self, arm: str, of: Callable[[Times], float]) -> dict[str, list[float]]:
        """Arm over plain engine, round by round, by start."""
        found: dict[str, list[float]] = {}
        for start, own, plain in zip(self.starts, self.times[arm], self.times["plain"], strict=True):
            found.setdefault(str(start), []).append(of(own) / of(plain))
        return found


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
            report.figures[f"{arm} {figure}, {name}"] = statistics.median(chain.from_iterable(ratios.values()))
            report.ci[f"{arm} {figure}, {name}"] = bootstrap(ratios, seed, statistics.median)
        accounts = cell.accounts[arm]
        if accounts[0]:
            report_account(report, f"{arm}, {name}", accounts)
    shown = {arm: f"{report.figures[f'{arm} p50, {name}']:.4f}" for arm in cell.times if arm != "plain"}
    print(f"{name}: plain p50 {1e3 * report.figures[f'plain p50 seconds, {name}']:.2f} ms; ratios {shown}", flush=True)


def report_account(report: Report, name: str, accounts: list[dict[str, float]]) -> None:
    """Rows, bytes, and where the time went: seconds per second of decoding, on the runner thread and beside it."""
    tokens = sum(each["tokens"] for each in accounts)
    seconds = sum(each["seconds"] for each in accounts)
    report.figures[f"captured share, {name}"] = captured_share(accounts)
    report.figures[f"row-heads captured per token, {name}"] = sum(each["captured"] for each in accounts) / tokens
    report.figures[f"bytes per token, {name}"] = sum(each["record_bytes"] for each in accounts) / tokens
    report.figures[f"search busy, {name}"] = sum(each["estimate_seconds"] for each in accounts) / seconds
    for hook in sorted(key for key in accounts[0] if key.startswith("hook: ")):
        report.figures[f"{hook}, {name}"] = sum(each.get(hook, 0.0) for each in accounts) / seconds
