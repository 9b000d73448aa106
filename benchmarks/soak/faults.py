"""What happens to the monitor and its neighbours, one fault a round; each ends by itself or as a supervisor ends it."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.soak.sidecar import Sidecar

LASTS = 5.0
"""Seconds."""


@dataclass(frozen=True)
class Fault:
    """`strike` returns when the fault is over, for an outside observer; the engine is the process of that id.

    Attributes:
        forgets: the store, and with it what was acknowledged, is the thing that breaks.
        ends_engine: the engine is killed and has to be started anew.
    """

    name: str
    strike: Callable[[Sidecar, int], None]
    forgets: bool = False
    ends_engine: bool = False


def _pid(sidecar: Sidecar) -> int:
    assert sidecar.process.process is not None
    return sidecar.process.process.pid


def _killed(sidecar: Sidecar, _: int) -> None:
    sidecar.process.kill()
    time.sleep(1)
    sidecar.process.start()


def _restarted(sidecar: Sidecar, _: int) -> None:
    sidecar.process.stop()
    sidecar.process.start()


def _hung(sidecar: Sidecar, _: int) -> None:
    os.kill(_pid(sidecar), signal.SIGSTOP)
    time.sleep(LASTS)
    os.kill(_pid(sidecar), signal.SIGCONT)


def _slow(sidecar: Sidecar, _: int) -> None:
    """A tenth of the time."""
    end = time.monotonic() + LASTS
    while time.monotonic() < end:
        os.kill(_pid(sidecar), signal.SIGSTOP)
        time.sleep(0.09)
        os.kill(_pid(sidecar), signal.SIGCONT)
        time.sleep(0.01)


def _disk_full(sidecar: Sidecar, _: int) -> None:
    """No file may grow beyond 4 KiB, as on a full disk."""
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(_pid(sidecar), resource.RLIMIT_FSIZE, (4096, unlimited))
    time.sleep(LASTS)
    resource.prlimit(_pid(sidecar), resource.RLIMIT_FSIZE, (unlimited, unlimited))


def _no_memory(sidecar: Sidecar, _: int) -> None:
    """No more memory than it has; where it ends of that, it is started again."""
    pid, unlimited = _pid(sidecar), resource.RLIM_INFINITY
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(pid, resource.RLIMIT_AS, (used, unlimited))
    end = time.monotonic() + LASTS
    assert sidecar.process.process is not None
    while time.monotonic() < end and sidecar.process.process.poll() is None:
        time.sleep(0.05)
    if sidecar.process.process.poll() is None:
        resource.prlimit(pid, resource.RLIMIT_AS, (unlimited, unlimited))
    else:
        sidecar.process.kill()
        sidecar.process.start()


def _cut_off(sidecar: Sidecar, _: int) -> None:
    """The connection of the publisher is dead, and nobody says so."""
    sidecar.proxy.silence()


def _store_damaged(sidecar: Sidecar, _: int) -> None:
    """All but the head of the file is overwritten while it is in use."""
    with sidecar.process.store.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(min(8192, size))
        file.write(os.urandom(max(0, size - 8192)))
        file.flush()
        os.fsync(file.fileno())


def _publisher_killed(_: Sidecar, engine: int) -> None:
    for child in psutil.Process(engine).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "stream_monitor.publisher" in child.cmdline():
                child.kill()


def _engine_killed(_: Sidecar, engine: int) -> None:
    family = [*psutil.Process(engine).children(recursive=True), psutil.Process(engine)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "stream_monitor.publisher" not in process.cmdline():
                process.kill()


FAULTS = (
    Fault("monitor killed", _killed),
    Fault("monitor hung", _hung),
    Fault("publisher killed", _publisher_killed),
    Fault("disk full", _disk_full),
    Fault("engine killed", _engine_killed, ends_engine=True),
    Fault("monitor slow", _slow),
    Fault("memory limit", _no_memory),
    Fault("store damaged", _store_damaged, forgets=True),
    Fault("connection cut off", _cut_off),
    Fault("monitor restarted", _restarted),
)
