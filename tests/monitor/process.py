"""A monitor in a process of its own, which a test may kill and start again on the same store."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc

from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc, monitor_pb2_grpc, summary_pb2

LOCAL = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 50)]


_GIVEN: set[int] = set()


def free_port() -> int:
    """Never the same twice. Below those that the kernel gives to connections, one of which could take it before it is
    used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _GIVEN:
                _GIVEN.add(port)
                return port


class Served:
    """A process of `stream-monitor COMMAND`, always at the same addresses; its log is kept.

    Attributes:
        settings: of the command, by their names; those of the next start.
    """

    def __init__(self, command: str, says: str, log: Path, settings: Mapping[str, object]) -> None:
        """`says` begins the line with which it is up; `settings` hold its gRPC address."""
        self._command, self._says, self.log = command, says, log
        self.settings = {"shutdown_grace_seconds": 1, **settings}
        self.process: subprocess.Popen[str] | None = None

    def run(self) -> None:
        """Start it (again); it listens then."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.settings.items()]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stream_monitor", self._command, *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(self._says), self.log.read_text()
        self.channel = grpc.insecure_channel(str(self.settings["grpc"]), LOCAL)
        self.api = monitor_pb2_grpc.MonitorServiceStub(self.channel)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal that ends it, and wait until it has ended."""
        if self.process is not None and self.process.poll() is None:
            self.channel.close()
            self.process.send_signal(number)
            self.process.wait(20)
            assert self.process.stdout is not None
            self.process.stdout.close()

    def kill(self) -> None:
        self.end(signal.SIGKILL)


class MonitorProcess(Served):
    """A monitor with its store in `folder`; it runs."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.store = folder / "store" / "monitor.db"
        self.address, self.ingest = f"127.0.0.1:{free_port()}", f"unix:{folder / 'ingest.sock'}"
        self.http = f"127.0.0.1:{free_port()}"
        addresses = {"ingest": self.ingest, "grpc": self.address, "http": self.http, "store": self.store}
        super().__init__("serve", "ready", folder / "monitor.log", {**addresses, **settings})
        self.start()

    def start(self, **more: object) -> None:
        """Start it (again), from now on with more settings."""
        self.settings |= more
        self.run()

    def stop(self) -> None:
        self.end()

    def publish(self, summaries: Sequence[summary_pb2.StepSummary]) -> None:
        """One stream; returns when all are taken in."""
        with grpc.insecure_channel(self.ingest, LOCAL) as channel:
            stub = ingest_pb2_grpc.IngestServiceStub(channel)
            requests = (ingest_pb2.PublishRequest(summary=summary) for summary in summaries)
            assert len(list(stub.Publish(requests, timeout=20))) == len(summaries)

    def wait_for_log(self, text: str, seconds: float = 10.0) -> None:
        """Until it has said something."""
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
