"""The demo's programme from start to end: with stand-ins for engine and monitor, and once with the real ones."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("fake_command.py")
PROGRAM = """
import sys
from stream_monitor.demo import processes, run
run.COMMAND = sys.argv.pop(1)
processes.Children.__init__.__defaults__ = (0.3,)
run.main()
"""


class Demo:
    """Starts the demo with the stand-ins; `folder` holds its temporary files."""

    def __init__(self, folder: Path) -> None:
        self.command = folder / "stream-monitor"
        self.command.write_text(f"#!{sys.executable}\n{FAKE.read_text()}")
        self.command.chmod(0o755)
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / ".complete").touch()
        self.temporary = folder / "tmp"
        self.temporary.mkdir()

    def start(self, *arguments: str, fault: str = "", before: str = "") -> "subprocess.Popen[str]":
        """`fault` is what the stand-ins do wrong; the programme runs `before` first."""
        program = [sys.executable, "-c", before + PROGRAM, str(self.command)]
        command = [*program, "--model", str(self.model), *arguments]
        env = os.environ | {"FAKE_FAULT": fault, "TMPDIR": str(self.temporary), "COLUMNS": "100"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=env, text=True)

    def processes(self) -> list[int]:
        """Ids of the stand-ins that run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(self.command).encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def assert_gone(self) -> None:
        assert self.processes() == []
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    return Demo(tmp_path)


def test_once_ends_with_the_account(demo: Demo) -> None:
    process = demo.start("--once")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == {
        "requests": 4,
        "tokens": 48,
        "rows_expected": 40,
        "rows_captured": 10,
        "rows_sampled_out": 30,
        "rows_dropped": 0,
        "rows_refused": 0,
        "events": 4,
    }
    assert "50% user 1 How old is Anna?" in out
    assert re.search(r"Open in a browser on this machine, and watch: http://127\.0\.0\.1:\d+/", out)
    assert "! It moved." in out
    demo.assert_gone()


def test_without_a_terminal_the_dialogue_ends_by_itself(demo: Demo) -> None:
    process = demo.start()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Ask something" in out
    demo.assert_gone()


def test_an_engine_that_dies_is_quoted(demo: Demo) -> None:
    process = demo.start("--once", fault="engine_dies")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "demo: vLLM ended with code 1" in err
    assert "ValueError: no such device" in err
    assert "Traceback" not in err
    # The whole log is kept for whoever must find out, and nothing else.
    (log,) = demo.temporary.iterdir()
    assert "no such device" in log.read_text()
    log.unlink()
    demo.assert_gone()


def test_a_monitor_that_goes_away_is_one_line(demo: Demo) -> None:
    process = demo.start("--once", fault="monitor_ends")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.strip() == "demo: the monitor ended the call: UNAVAILABLE: shutting down"
    demo.assert_gone()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_while_the_engine_starts(demo: Demo, name: str) -> None:
    process = demo.start("--once", fault="engine_hangs")
    deadline = time.monotonic() + 60
    while len(demo.processes()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.Signals[name])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    demo.assert_gone()


@pytest.mark.parametrize("after", [0.05, 0.8, 2.2])
def test_interrupted_at_any_moment(demo: Demo, after: float) -> None:
    process = demo.start()
    time.sleep(after)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    demo.assert_gone()


def test_interrupted_as_soon_as_there_is_something_to_clean_up(demo: Demo) -> None:
    # `os.mkdir` is what pathlib and tempfile call.
    told_to_end = """
import os, signal
make = os.mkdir
def make_and_be_told_to_end(*arguments, **options):
    make(*arguments, **options)
    os.kill(os.getpid(), signal.SIGTERM)
os.mkdir = make_and_be_told_to_end
"""
    process = demo.start("--once", before=told_to_end)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    demo.assert_gone()


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(400)
def test_with_the_real_engine(model_dir: Path) -> None:
    command = [sys.executable, "-m", "stream_monitor.demo", "--once", "--model", str(model_dir)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    account = json.loads(result.stdout.splitlines()[-1])
    assert account["requests"] == 4
    assert account["tokens"] > 100
    assert 0 < account["rows_captured"] < account["rows_expected"]
    assert account["rows_dropped"] == 0
