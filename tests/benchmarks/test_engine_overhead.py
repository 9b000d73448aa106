"""The arithmetic of the overhead benchmark, on runs made up here."""

import random

import pytest

from benchmarks.engine_overhead.__main__ import worst
from benchmarks.engine_overhead.cells import Cell, Times, captured_share, report_cell
from benchmarks.engine_overhead.within_run import steps_over_quiet_ones
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
        "steps": 0,
        "stride": 0,
    }


class Arm:
    """Answers with one run after the other; while its capture is paused, always with the same."""

    def __init__(self, name: str, results: list[dict], paused: dict | None = None) -> None:
        self.name, self._results, self._paused = name, iter(results), paused
        self.captures = paused is not None

    def ask(self, do: str, paused: bool, **arguments: object) -> dict:
        assert do == "run"
        if paused:
            assert self._paused is not None
            return self._paused
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


def test_a_start_s_figure_is_the_median_of_its_rounds_and_the_first_round_does_not_count():
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
    assert cell.ratios("off", "plain", lambda times: times.p50) == {"0": [1.0, 1.0], "1": [3.0, 3.0]}
    report = Report("engine_overhead", {}, 0, 4)
    report_cell(report, "here", cell, 0)
    assert report.figures["off p50, here"] == 2.0
    assert report.ci["off p50, here"] == (1.0, 3.0)


def test_a_capture_is_also_compared_with_itself_paused():
    arms = [Arm("plain", [result(1.0)] * 3), Arm("capturing", [result(1.2, captured=25.0)] * 3, paused=result(1.1))]
    cell = Cell()
    cell.measure(arms, [[1]], 4, 2, random.Random(0))
    report = Report("engine_overhead", {}, 0, 2)
    report_cell(report, "here", cell, 0)
    assert report.figures["capturing p50, here"] == pytest.approx(1.2)
    assert report.figures["capturing paused p50, here"] == pytest.approx(1.1)
    assert report.figures["capturing p50 over itself paused, here"] == pytest.approx(1.2 / 1.1)
    assert report.figures["captured share, capturing, here"] == 1.0


@pytest.mark.parametrize("key", ["tokens", "schedule"])
def test_another_answer_or_schedule_is_seen_in_any_round(key):
    other = result(1.0) | {key: [[8]]}
    assert not cell_of(plain=[result(1.0), result(1.0)], off=[other, result(1.0)]).same


def test_what_a_captured_step_costs_is_told_by_the_run_itself():
    # Steps 8 and 12 have rows, 9 and 13 run beside the search for them.
    seconds = {6: 1.0, 7: 1.0, 8: 1.3, 9: 1.1, 10: 1.0, 11: 1.0, 12: 1.3, 13: 1.1, 14: 1.0}
    stamps = [0.0]
    for each in seconds.values():
        stamps.append(stamps[-1] + each)
    told = {"stamps": [stamps], "steps": 4, "stride": 4, "schedule": [{}] * 10}
    assert steps_over_quiet_ones(told) == pytest.approx(1.1)
    assert steps_over_quiet_ones(told | {"stride": 1}) is None
    assert steps_over_quiet_ones(told | {"schedule": [{}] * 11}) is None, "a prompt in two steps"


def test_rows_that_were_picked_and_not_captured_lower_the_share():
    account = {"expected": 100.0, "sampled_out": 75.0, "captured": 24.0}
    assert captured_share([account, account]) == 0.96
    assert captured_share([{"expected": 9.0, "sampled_out": 9.0, "captured": 0.0}]) == 0.0


def test_the_worst_cell_counts():
    report = Report("engine_overhead", {}, 0, 1)
    report.figures |= {"off p50, a": 1.0, "off p50, b": 1.2, "off throughput, a": 0.9, "off throughput, b": 1.0}
    assert worst(report, "off p50", "<=") == 1.2
    assert worst(report, "off throughput", ">=") == 0.9
