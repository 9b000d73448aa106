"""What `stream-monitor doctor` says before it looks at any model; with real models in tests/e2e/test_doctor.py."""

import pytest

from stream_monitor.config import CaptureSettings
from stream_monitor.engine.doctor import _off

PLUGINS = "VLLM_PLUGINS"


@pytest.mark.parametrize("named", [None, "stream_monitor", "other, stream_monitor"])
def test_a_plug_in_that_is_loaded_is_not_off(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLUGINS, raising=False)
    if named is not None:
        monkeypatch.setenv(PLUGINS, named)
    assert _off(CaptureSettings()) == ()


def test_what_switches_it_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLUGINS, "other")
    disabled, not_loaded = _off(CaptureSettings(disable=True))
    assert disabled == "STREAM_MONITOR_DISABLE switches the plug-in off"
    assert not_loaded == "VLLM_PLUGINS is 'other', without stream_monitor: vLLM does not load the plug-in"
