"""The JSON line that every benchmark ends with."""

import json
import math
import sys

import pytest
import typer

from benchmarks.report import Report, bootstrap, run
from stream_monitor.tracing.errors import TracingError


def a_report(value: float) -> Report:
    return Report(
        benchmark="example",
        config={"tokens": 7},
        seed=3,
        n=2,
        figures={"recall": value, "time_ms": 1.23456789},
        ci={"recall": (0.1, 0.2)},
        must={"recall": (">=", 0.5), "time_ms": ("<=", 2.0)},
    )


def test_the_line_has_the_promised_keys_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    a_report(0.75).finish()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(line) == ["benchmark", "config", "seed", "n", "figures", "ci", "must", "pass", "machine"]
    assert line["figures"] == {"recall": 0.75, "time_ms": 1.23457}
    assert line["ci"] == {"recall": [0.1, 0.2]}
    assert line["must"] == {"recall": [">=", 0.5], "time_ms": ["<=", 2.0]}
    assert line["pass"] is True
    assert line["machine"]["cores"] >= 1


def test_a_missed_must_exits_1_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as stopped:
        a_report(0.25).finish()
    assert stopped.value.exit_code == 1
    missed, line = capsys.readouterr().out.splitlines()
    assert missed == "missed: recall is 0.25, must be >= 0.5"
    assert json.loads(line)["pass"] is False


def test_a_must_without_its_figure_is_missed() -> None:
    report = a_report(0.75)
    report.must["speed"] = (">=", 0.0)
    assert report.missed() == ["speed"]


@pytest.mark.parametrize(("value", "code"), [(0.75, 0), (0.25, 1)])
def test_the_process_exits_as_the_report_says(
    value: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["example"])
    with pytest.raises(SystemExit) as stopped:
        run(lambda: a_report(value).finish())
    assert stopped.value.code == code


@pytest.mark.parametrize("arguments", [["--nonsense"], ["--count", "many"], ["--count", "-1"]])
def test_bad_arguments_give_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(count: int = 1) -> None:
        if count < 0:
            raise typer.BadParameter("a count is at least 0")

    monkeypatch.setattr(sys, "argv", ["example", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run(command)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1


def test_the_bootstrap_draws_whole_clusters() -> None:
    # Within a cluster nothing varies, so only the choice of clusters can.
    assert bootstrap({"a": [1.0] * 50, "b": [1.0] * 2}, seed=0) == (1.0, 1.0)
    low, high = bootstrap({"a": [0.0] * 10, "b": [1.0] * 10, "c": [1.0] * 10}, seed=0)
    assert (low, high) == (0.0, 1.0)
    assert bootstrap({"a": [0.0], "b": [1.0]}, seed=5) == bootstrap({"a": [0.0], "b": [1.0]}, seed=5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_could_not_be_measured_is_missed_and_not_in_the_line(
    value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    report = a_report(value)
    report.ci["recall"] = (0.1, value)
    with pytest.raises(typer.Exit):
        report.finish()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(line["figures"]) == ["time_ms"]
    assert line["ci"] == {}
    assert line["pass"] is False


def test_what_a_model_or_a_text_is_refused_for_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["example"])

    def command() -> None:
        raise TracingError("the prompt is too long")

    with pytest.raises(SystemExit) as stopped:
        run(command)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the prompt is too long\n"
