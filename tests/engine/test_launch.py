"""`stream-monitor vllm` up to where vLLM takes over."""

import os
from collections.abc import Sequence

import pytest

from stream_monitor.engine import launch


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Command lines by which this process was replaced."""
    found: list[Sequence[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, line: found.append(line))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return found


def test_an_engine_that_would_not_load_the_plug_in_is_not_started(
    executed: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert launch.main("model", []) == 2
    assert executed == []
    assert capsys.readouterr().err.splitlines() == [
        "stream-monitor vllm: VLLM_PLUGINS is 'other', without stream_monitor: vLLM does not load the plug-in; add "
        "stream_monitor to it, or unset it"
    ]


@pytest.mark.parametrize(
    "environment",
    [{}, {"VLLM_PLUGINS": "other,stream_monitor"}, {"VLLM_PLUGINS": "other", "STREAM_MONITOR_DISABLE": "1"}],
)
def test_one_that_loads_it_or_need_not_is(
    executed: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch.main("model", ["-tp=2"])
    assert [line[2:] for line in executed] == [launch.command("model", ["-tp=2"])[2:]]
