"""Settings: which source wins, and what a wrong one is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from stream_monitor.addresses import check_address
from stream_monitor.config import CaptureSettings, MonitorSettings, SettingsError, load


def test_command_line_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[monitor]\nmax_traces = 1\nmax_sentences = 17\nevent_log = 1\n[capture]\nstride = 9\n")
    monkeypatch.setenv("STREAM_MONITOR_CONFIG", str(file))
    monkeypatch.setenv("STREAM_MONITOR_MAX_SENTENCES", "18")
    monkeypatch.setenv("STREAM_MONITOR_EVENT_LOG", "2")
    settings = load(MonitorSettings, event_log=3, max_engines=None)
    assert (settings.max_traces, settings.max_sentences, settings.event_log) == (1, 18, 3)
    assert settings.max_engines == MonitorSettings.model_fields["max_engines"].default
    assert load(CaptureSettings).stride == 9


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[monitr]\n", ("[monitr]", "[capture], [monitor]")),
        ("[monitor]\nmax_tarces = 1\n", ("max_tarces", "max_traces")),
        ("[monitor]\nmax_traces = 'x'\n", ("max_traces", "'x'")),
        ("[monitor\n", ("STREAM_MONITOR_CONFIG", "not TOML")),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, named: tuple[str, ...]
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(content)
    monkeypatch.setenv("STREAM_MONITOR_CONFIG", str(file))
    with pytest.raises(SettingsError) as error:
        load(MonitorSettings)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in named)


def test_a_missing_file_and_an_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_MONITOR_CONFIG", "/nowhere/settings.toml")
    with pytest.raises(SettingsError, match="cannot read /nowhere"):
        load(MonitorSettings)
    monkeypatch.delenv("STREAM_MONITOR_CONFIG")
    monkeypatch.setenv("STREAM_MONITOR_GPRC", "127.0.0.1:1")
    with pytest.raises(SettingsError, match=r"STREAM_MONITOR_GPRC: no such setting; valid: .*STREAM_MONITOR_GRPC"):
        load(MonitorSettings)


def test_every_default_of_the_capture_may_be_given_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, field in CaptureSettings.model_fields.items():
        value = field.get_default(call_default_factory=True)
        monkeypatch.setenv(f"STREAM_MONITOR_{name.upper()}", str(value))
    assert load(CaptureSettings) == CaptureSettings.model_construct()
    monkeypatch.setenv("STREAM_MONITOR_BLOCK_SIZE", "16")
    assert load(CaptureSettings).block_size == 16
    monkeypatch.setenv("STREAM_MONITOR_BLOCK_SIZE", "17")
    with pytest.raises(SettingsError, match="block_size: Input should be 8, 16, 32, 64 or 128"):
        load(CaptureSettings)


def test_rows_of_prompts_are_none_or_one_in_16_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(CaptureSettings).prompt_stride == 0
    monkeypatch.setenv("STREAM_MONITOR_PROMPT_STRIDE", "16")
    assert load(CaptureSettings).prompt_stride == 16
    monkeypatch.setenv("STREAM_MONITOR_PROMPT_STRIDE", "5")
    with pytest.raises(SettingsError, match=r"prompt_stride: .*must be 0 or from 16 to 4096.*'5'"):
        load(CaptureSettings)


@pytest.mark.parametrize("address", ["unix:/run/x.sock", "localhost:0", "[::1]:9750", "10.0.0.1:65535"])
def test_addresses(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize("address", ["", "unix:", "9750", ":9750", "host:", "host:99999", "host:http"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="unix:/path or host:port"):
        check_address(address)


def test_the_default_socket_is_in_the_users_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert load(MonitorSettings).ingest == load(CaptureSettings).target == "unix:/run/user/7/stream-monitor/ingest.sock"


@pytest.mark.parametrize(
    "setting", [{"store_days": "inf"}, {"store_days": "99999"}, {"nats_days": "1e300"}, {"max_calls": "9" * 20}]
)
def test_numbers_that_no_clock_or_counter_holds_are_refused(setting: dict[str, str]) -> None:
    (name,) = setting
    with pytest.raises(SettingsError, match=f"^{name}: Input should be less than or equal to"):
        load(MonitorSettings, **setting)


def test_a_command_that_is_told_to_end_is_interrupted() -> None:
    code = """
import os, signal
from stream_monitor.interrupts import end_as_at_ctrl_c
end_as_at_ctrl_c()
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    try:
        os.kill(os.getpid(), number)
        signal.pause()
    except KeyboardInterrupt:
        print(number.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.split(), done.returncode) == (["SIGTERM", "SIGHUP", "SIGINT"], 0), done.stderr
