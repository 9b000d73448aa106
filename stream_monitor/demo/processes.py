"""Child processes that never outlive the demo, whatever they start themselves and however the demo ends."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from stream_monitor.interrupts import end_as_at_ctrl_c

# From linux/prctl.h. Orphans among the descendants become children of this process instead of init's, so that a
# process that left its group, or whose parent died first, is still found.
PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.05
# The last line of a traceback, after whatever a logger put in front of it.
ERROR_LINE = re.compile(r"(?<![\w.])[\w.]*(?:Error|Exception): .+")


@dataclass(frozen=True)
class Child:
    """One process started by the demo, and the file that takes its output."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def last_words(self, lines: int = 12) -> str:
        """What of its output most likely says why it failed: the errors it names, first to last, and its last lines.

        vLLM's front end ends with a traceback of its own; the cause is further up, from the process that had it.
        """
        text = self.log.read_text(errors="replace").splitlines()
        errors = dict.fromkeys(found.group() for line in text if (found := ERROR_LINE.search(line)))
        return "\n".join([*errors, "...", *text[-lines:]])


class Children:
    """Context manager: on exit, everything this process ever started is gone.

    Children are asked to end (SIGTERM) one by one, the newest first, since a later one may lean on an earlier one;
    after `grace_seconds` each, they and all their descendants are killed.
    """

    def __init__(self, grace_seconds: float = 10.0) -> None:
        self._grace_seconds = grace_seconds
        self._children: list[Child] = []

    def __enter__(self) -> "Children":
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        end_as_at_ctrl_c()
        return self

    def start(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]) -> Child:
        """Start `command` in a session of its own: the terminal's Ctrl-C reaches only the demo, which ends the rest."""
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # From here on nothing may stop the clean-up; it takes `grace_seconds` a child at most.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for child in reversed(self._children):
            self._end(child)
        # What left its group, or was started at the moment the demo was interrupted, is a descendant all the same.
        while left := descendants(os.getpid()):
            _kill(left)
            time.sleep(POLL_SECONDS)

    def _end(self, child: Child) -> None:
        child.process.terminate()
        try:
            child.process.wait(self._grace_seconds)
        except subprocess.TimeoutExpired:
            _kill([*descendants(child.process.pid), child.process.pid])
            child.process.wait()


def descendants(pid: int) -> list[int]:
    """Ids of the processes below `pid` that run, in no order; dead ones that are `pid`'s own to reap are reaped."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent ...": the name may hold spaces and brackets.
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):  # it ended meanwhile
            continue
        children[int(parent)].append((int(stat.parent.name), state))
    found: list[int] = []
    todo = [pid]
    while todo:
        for child, state in children[todo.pop()]:
            todo.append(child)
            if state != "Z":
                found.append(child)
            elif pid == os.getpid():
                _reap(child)
    return found


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):  # its own parent will
        os.waitpid(pid, os.WNOHANG)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
