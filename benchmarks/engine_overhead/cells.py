"""One context and concurrency: what each engine's rounds gave, and the figures of it."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from benchmarks.engine_overhead.arms import Arm
from benchmarks.engine_overhead.within_run import steps_over_quiet_ones
from benchmarks.report import Report, bootstrap

PAUSED = " paused"


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
        times, accounts: by arm, in the order of the rounds; an account is empty without a capture. An engine that
            captures also runs with its capture paused: `NAME paused`.
        within_run: by arm, of each round that tells it: its steps over those without rows.
        starts: which start of the engines each round belongs to.
        seconds: what the rounds of the latest start took, with the one that does not count.
        same: whether schedules and tokens were the plain engine's in every round.
    """

    times: dict[str, list[Times]] = field(default_factory=dict)
    accounts: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    within_run: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    seconds: float = 0.0
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
        begin = time.perf_counter()
        for number in range(-1, rounds):
            results = {}
            for arm in draw.sample(arms, len(arms)):
                for paused in draw.sample([False, True], 2) if arm.captures else [False]:
                    results[arm.name + PAUSED * paused] = arm.ask(
                        "run", prompts=prompts, new_tokens=new_tokens, paused=paused
                    )
            plain = results["plain"]
            self.same &= all(result[key] == plain[key] for result in results.values() for key in ("schedule", "tokens"))
            if number < 0:
                continue
            self.starts.append(start)
            for name, result in results.items():
                self.times.setdefault(name, []).append(Times.of(result))
                whole = {"seconds": result["seconds"], "tokens": sum(map(len, result["tokens"]))}
                self.accounts.setdefault(name, []).append(result["account"] and result["account"] | whole)
                if (ratio := steps_over_quiet_ones(result)) is not None:
                    self.within_run.setdefault(name, {}).setdefault(str(start), []).append(ratio)
        self.seconds = time.perf_counter() - begin

    def ratios(self, arm: str, base: str, of: Callable[[Times], float]) -> dict[str, list[float]]:
        """Arm over base, round by round, by start."""
        found: dict[str, list[float]] = {}
        for start, own, other in zip(self.starts, self.times[arm], self.times[base], strict=True):
            found.setdefault(str(start), []).append(of(own) / of(other))
        return found


def captured_share(accounts: list[dict[str, float]]) -> float:
    """Rows captured over rows that the stride had picked."""
    picked = sum(each["expected"] - each["sampled_out"] for each in accounts)
    return sum(each["captured"] for each in accounts) / picked if picked else 0.0


def report_cell(report: Report, name: str, cell: Cell, seed: int) -> None:
    """Figures of one cell."""
    plain = cell.times["plain"]
    report.figures[f"plain p50 seconds, {name}"] = statistics.median(times.p50 for times in plain)
    for arm in cell.times:
        if arm != "plain":
            report_ratios(report, f"{{}}, {name}", cell, (arm, "plain"), seed)
        if arm + PAUSED in cell.times:
            report_ratios(report, f"{{}} over itself paused, {name}", cell, (arm, arm + PAUSED), seed)
        if ratios := cell.within_run.get(arm):
            full = f"{arm} steps over those without rows, {name}"
            runs = list(chain.from_iterable(ratios.values()))
            report.figures[full] = statistics.fmean(runs)
            # Nothing that lasts for a start has a part in these, so that each run tells by itself.
            report.ci[full] = bootstrap({str(number): [ratio] for number, ratio in enumerate(runs)}, seed)
        accounts = cell.accounts[arm]
        if accounts[0]:
            report_account(report, f"{arm}, {name}", accounts)


def report_ratios(report: Report, name: str, cell: Cell, pair: tuple[str, str], seed: int) -> None:
    """Ratios of one arm to another: the mean of the starts' medians; the name has a gap for arm and figure."""
    figures: dict[str, Callable[[Times], float]] = {
        "p50": lambda times: times.p50,
        "p99": lambda times: times.p99,
        "first token": lambda times: times.first_token,
        "throughput": lambda times: times.throughput,
    }
    for figure, of in figures.items():
        medians = {start: [statistics.median(ratios)] for start, ratios in cell.ratios(*pair, of).items()}
        full = name.format(f"{pair[0]} {figure}")
        report.figures[full] = statistics.fmean(median for (median,) in medians.values())
        report.ci[full] = bootstrap(medians, seed)


def print_start(name: str, cell: Cell) -> None:
    """The ratios of the latest start, so that a run that is cut off leaves something."""
    latest = str(cell.starts[-1])
    pairs = [(arm, "plain") for arm in cell.times if arm != "plain"]
    pairs += [(arm, arm + PAUSED) for arm in cell.times if arm + PAUSED in cell.times]
    shown = [
        f"{arm} / {base} {statistics.median(cell.ratios(arm, base, lambda times: times.p50)[latest]):.3f}"
        for arm, base in pairs
    ]
    shown += [
        f"{arm} / its steps without rows {statistics.fmean(ratios[latest]):.3f}"
        for arm, ratios in cell.within_run.items()
        if latest in ratios
    ]
    for arm, accounts in cell.accounts.items():
        here = [account for start, account in zip(cell.starts, accounts, strict=True) if str(start) == latest]
        if here[0]:
            seconds = sum(account["seconds"] for account in here)
            hooks = sum(value for account in here for key, value in account.items() if key.startswith("hook: "))
            shown.append(f"{arm} in its hooks {hooks / seconds:.2%}, captured share {captured_share(here):.3f}")
    plain = statistics.median(
        times.p50 for start, times in zip(cell.starts, cell.times["plain"], strict=True) if str(start) == latest
    )
    same = "the same" if cell.same else "NOT the same"
    print(
        f"start {latest}, {name} in {cell.seconds:.0f} s, p50 of plain {plain * 1e3:.2f} ms; {'; '.join(shown)}; "
        f"tokens {same}",
        flush=True,
    )


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
