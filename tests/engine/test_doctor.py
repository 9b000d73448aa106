"""What `stream-monitor doctor` says of plans, and where there is none; with real models in tests/e2e/test_doctor.py."""

import os
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from stream_monitor.config import CaptureSettings
from stream_monitor.engine import doctor
from stream_monitor.engine.doctor import _off
from stream_monitor.engine.plan import make_plan
from stream_monitor.socket_folders import own_folder
from tests.engine.test_plan import facts

PLUGINS = "VLLM_PLUGINS"


@pytest.mark.parametrize("named", [None, "stream_monitor", "other,stream_monitor"])
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
    monkeypatch.setenv(PLUGINS, "other, stream_monitor")
    (not_loaded,) = _off(CaptureSettings())
    assert "with a space, which vLLM takes for a part of the name" in not_loaded


class Sizes(BaseModel):
    """Stands in for vLLM's configurations, which look at each field, then at all of them together."""

    heads: int
    layers: int

    @model_validator(mode="after")
    def together(self) -> "Sizes":
        raise ValueError(f"{self.layers} layers\nare too few")


def invalid(**fields: object) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Sizes(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (invalid(heads=None, layers=None), "heads: Input should be a valid integer"),
        (invalid(heads=1, layers=2), "Value error, 2 layers"),
        (OSError("no such model\nIf it is private, ..."), "no such model"),
        (ValueError(), "ValueError"),
        (RuntimeError("no data\nof it"), "vLLM cannot build it without its weights: RuntimeError: no data"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(model: str, settings: CaptureSettings) -> NoReturn:
        raise error

    monkeypatch.setattr(doctor, "plan_for", fail)
    assert doctor.main("some/model") == 2
    assert capsys.readouterr() == ("", f"stream-monitor doctor: some/model: {said}\n")


def test_reasons_and_verdicts_are_whole_on_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = facts(12, name="language_model.model.layers.12.linear_attn", kind="GatedDeltaNetAttention")
    layers = [facts(0, sliding_window=4096), facts(1), facts(2), linear]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(doctor, "plan_for", lambda model, settings: make_plan(layers, (), CaptureSettings(layers="1")))
    assert doctor.main("some/model") == 0
    lines = capsys.readouterr().out.splitlines()
    # A line each, however wide the screen: they are searched for, and copied.
    assert lines[-2:] == [
        "- layers 0: sliding window of 4096 tokens",
        "- layers 12: GatedDeltaNetAttention is not softmax attention over a KV cache we know",
    ]
    assert max(map(len, lines[1:-2])) <= 80
    cells = [[cell.strip() for cell in line[1:-1].split("│")] for line in lines if line.startswith("│")]
    index, name, implementation, _, _, verdict = zip(*cells, strict=True)
    assert [text for text in index if text] == ["0", "1", "2", "12"]
    assert [text for text in verdict if text] == ["refused", "watched", "not watched", "refused"]
    assert "".join(name) == "".join(layer.name for layer in layers)
    assert "".join(implementation) == "".join(layer.implementation for layer in layers)


def test_a_socket_in_a_strangers_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert _off(CaptureSettings()) == ()
    own_folder().mkdir(mode=0o700)
    (said,) = _off(CaptureSettings())
    assert said == (
        f"target: folder {own_folder()} belongs to user {owner}, not to us ({owner + 1}); have it removed, or name "
        "another socket: target, and ingest of the monitor"
    )
