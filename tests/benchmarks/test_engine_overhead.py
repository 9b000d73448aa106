"""The arithmetic of the overhead benchmark, on runs made up here."""

import random

import pytest

from benchmarks.engine_overhead.__main__ import worst
from benchmarks.engine_overhead.cells import Cell, Times, captured_share, report_cell
from benchmarks.report import Report


def result(step: float, tokens: int = 4, requests: int = 2, first: float = 1.0, captured: float | None = None) -> dict:
    """Requests whose tokens come `step` seconds apart."""
    stamps = [[first + step * n for n in range(tokens)] for _ in range(requests)]
    account = {}
    if captured is not None:
        account = {"expected": 100.0, "sampled_out": 75.0, "captured": captured, "record_bytes": 80.0}
        account |= {"estimate_seconds": 0.1, "hook: before_step": 0.2}
    return {
        "seconds": stamps[0][-1],
        "stamps": stamps,
        "tokens": [[7] * tokens] * requests,
        "schedule": [{"0": 1}],
        "account": account,
    }


class Arm:
    """Answers with one run after the other."""

    def __init__(self, name: str, results: list[dict]) -> None:
        self.name, self._results = name, iter(results)

    def ask(self, do: str, **arguments: object) -> dict:
        assert do == "run"
        return next(self._results)


def cell_of(**arms: list[dict]) -> Cell:
    rounds = len(next(iter(arms.values()))) - 1
    cell = Cell()
    cell.measure([Arm(name, results) for name, results in arms.items()], [[1]], 4, rounds, random.Random(0))
    return cell


def test_times_of_a_run():
    times = Times.of(result(0.5))
    assert (times.p50, times.p99, times.first_token) == (0.5, 0.5, 1.0)
    assert times.throughput == pytest.approx(8 / 2.5)


def test_a_figure_is_the_median_of_the_rounds_ratios_and_the_first_round_does_not_count():
    plain = [result(9.0), result(1.0), result(2.0), result(4.0)]
    own = [result(1.0, captured=25.0), *(result(step, captured=25.0) for step in (1.1, 2.02, 4.04))]
    cell = cell_of(plain=plain, capturing=own)
    report = Report("engine_overhead", {}, 0, 3)
    report_cell(report, "here", cell, 0)
    assert report.figures["capturing p50, here"] == pytest.approx(1.01)
    assert report.ci["capturing p50, here"][0] <= 1.01 <= report.ci["capturing p50, here"][1]
    assert report.figures["captured share, capturing, here"] == 1.0
    assert report.figures["bytes per token, capturing, here"] == 10.0
    assert cell.same


def test_rounds_of_one_start_of_the_engines_stay_together():
    cell = Cell()
    for step in (1.0, 3.0):
        arms = [Arm("plain", [result(1.0)] * 3), Arm("off", [result(step)] * 3)]
        cell.measure(arms, [[1]], 4, 2, random.Random(0))
    assert cell.ratios("off", lambda times: times.p50) == {"0": [1.0, 1.0], "1": [3.0, 3.0]}
    report = Report("engine_overhead", {}, 0, 4)
    report_cell(report, "here", cell, 0)
    assert report.ci["off p50, here"] == (1.0, 3.0)


@pytest.mark.parametrize("key", ["tokens", "schedule"])
def test_another_answer_or_schedule_is_seen_in_any_round(key):
    other = result(1.0) | {key: [[8]]}
    assert not cell_of(plain=[result(1.0), result(1.0)], off=[other, result(1.0)]).same


def test_rows_that_were_picked_and_not_captured_lower_the_share():
    account = {"expected": 100.0, "sampled_out": 75.0, "captured": 24.0}
    assert captured_share([account, account]) == 0.96
    assert captured_share([{"expected": 9.0, "sampled_out": 9.0, "captured": 0.0}]) == 0.0


def test_the_worst_cell_counts():
    report = Report("engine_overhead", {}, 0, 1)
    report.figures |= {"off p50, a": 1.0, "off p50, b": 1.2, "off throughput, a": 0.9, "off throughput, b": 1.0}
    assert worst(report, "off p50", "<=") == 1.2
    assert worst(report, "off throughput", ">=") == 0.9
