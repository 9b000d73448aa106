"""The worker's side: start the publisher, see that it runs, end it. Imports no gRPC."""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Collection
from typing import IO

import msgspec

from stream_monitor.records import EngineInfo
from stream_monitor.target import Target

STOP = b"stop\n"
"""Written to the publisher's standard input before its end, when the worker stops in order."""
FIRST_RESTART, LONGEST_RESTART = 0.5, 30.0
"""Seconds before a publisher that died is started again; doubled each time, anew after it lived for the longest."""
# The engine's own OpenMP and allocator settings do not fit a small process on another core; gRPC says everything
# through statuses, which we log ourselves.
_NOT_INHERITED = ("LD_PRELOAD", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_ADDED = {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0"}

log = logging.getLogger("vllm.stream_monitor")


class PublisherProcess:
    """A publisher for the ring open as `ring_fd`, running on `cpus` (empty: as the worker).

    Each start inherits `ring_fd`, which must stay open until `stop`. Nothing here raises into the engine once
    constructed. Not thread-safe.
    """

    def __init__(self, ring_fd: int, info: EngineInfo, target: Target, cpus: Collection[int] = ()) -> None:
        self._ring_fd = ring_fd
        self._command = [sys.executable, "-m", "stream_monitor.publisher", "--ring-fd", str(ring_fd)]
        # The names of files, whatever is secret in them.
        self._command += ["--target", msgspec.json.encode(target).decode()]
        if cpus:
            self._command += ["--cpus", ",".join(map(str, sorted(cpus)))]
        self._info = msgspec.json.encode(info) + b"\n"
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: IO[bytes] | None = None
        self._stopped = False
        self._started_at = self._not_before = 0.0
        self._wait = FIRST_RESTART
        self.restarts = 0
        """Times it was started again after it died or could not be started."""
        self.trouble = ""
        """Why it could not be started the last time; empty if it could."""

    def start(self) -> None:
        """Start it; a failure is logged once, and shows in `poll`, which tries again."""
        self._started_at = time.monotonic()
        environment = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED} | _ADDED
        self._process = None
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, bufsize=0, env=environment, pass_fds=(self._ring_fd,)
            )
        except OSError as error:
            if not self.trouble:
                log.error(
                    "Stream Monitor: the publisher cannot be started (%s: %s); nothing reaches the monitor, and it is "
                    "tried again",
                    self._command[0],
                    error.strerror,
                )
            self.trouble = f"the publisher cannot be started: {error.strerror}"
            return
        if self.trouble:
            log.warning("Stream Monitor: the publisher runs")
            self.trouble = ""
        self._pipe = self._process.stdin
        self._tell(self._info)

    def poll(self) -> bool:
        """Whether it runs. One that died is started again, after a pause that grows. Cheap: call it every step."""
        if self._process is not None and self._process.poll() is None:
            return True
        if self._stopped:
            return False
        now = time.monotonic()
        if self._not_before <= self._started_at:
            if now - self._started_at > LONGEST_RESTART:
                self._wait = FIRST_RESTART
            self._close_pipe()
            self._not_before = now + self._wait
            self._wait = min(2 * self._wait, LONGEST_RESTART)
        elif now >= self._not_before:
            self.restarts += 1
            self.start()
            return self._process is not None
        return False

    def stop(self, grace: float = 3.0) -> None:
        """Let it drain the ring, for `grace` seconds at most, then end it. Call before closing the ring."""
        self._stopped = True
        if self._process is None:
            return
        self._tell(STOP)
        self._close_pipe()
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int | None:
        """Of the running process, or of the last one."""
        return self._process.pid if self._process is not None else None

    def _tell(self, data: bytes) -> None:
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._pipe.write(data)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._pipe.close()
            self._pipe = None
