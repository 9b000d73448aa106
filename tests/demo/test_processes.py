"""No process outlives the demo, however it ends. Real processes, the worst behaved ones there are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Ignores every polite signal, and has a child that does so too in a session of its own; each writes its id.
STUBBORN = """
import os, signal, sys, time
from pathlib import Path
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
(Path(sys.argv[1]) / str(os.getpid())).touch()
time.sleep(60)
"""

# Its parent is gone at once, as that of a daemon.
ORPHAN = """
import os, sys, time
from pathlib import Path
if os.fork():
    os._exit(0)
os.setsid()
(Path(sys.argv[1]) / str(os.getpid())).touch()
time.sleep(60)
"""

DEMO = """
import os, sys, time
from pathlib import Path
from stream_monitor.demo.processes import Children
program, pids, expected, ending = sys.argv[1:]
with Children(grace_seconds=0.2) as children:
    children.start("child", [sys.executable, "-c", program, pids], Path(pids).parent / "log", os.environ)
    while len(os.listdir(pids)) < int(expected):
        time.sleep(0.01)
    print("ready", flush=True)
    if ending == "error":
        raise RuntimeError("something went wrong")
    if ending == "signal":
        time.sleep(60)
"""


def runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("program", "processes"), [(STUBBORN, 2), (ORPHAN, 1)], ids=["stubborn", "orphan"])
@pytest.mark.parametrize("ending", ["return", "error", "SIGINT", "SIGTERM", "SIGHUP"])
def test_nothing_is_left_behind(tmp_path: Path, program: str, processes: int, ending: str) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    how = "signal" if ending.startswith("SIG") else ending
    command = [sys.executable, "-c", DEMO, program, str(pids), str(processes), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline() == b"ready\n"
        if how == "signal":
            demo.send_signal(signal.Signals[ending])
        demo.wait(10)
    started = [int(path.name) for path in pids.iterdir()]
    assert len(started) == processes
    left = [pid for pid in started if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_a_second_interrupt_does_not_stop_the_clean_up(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    command = [sys.executable, "-c", DEMO.replace("0.2", "1.0"), STUBBORN, str(pids), "2", "signal"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as demo:
        assert demo.stdout is not None
        demo.stdout.readline()
        for _ in range(3):
            demo.send_signal(signal.SIGINT)
            time.sleep(0.2)
        demo.wait(10)
    assert not [path.name for path in pids.iterdir() if runs(int(path.name))]
