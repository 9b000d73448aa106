"""A process of the fleet, which a test may kill and start again, and how to wait for what it shows."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families

from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc
from tests.monitor.process import LOCAL, free_port

SECONDS = 60.0
SHIFTING = [4] * 14 + [30] * 8
"""Anchors of a request with one finding: they move."""


def until(condition: Callable[[], bool], what: Callable[[], object] = lambda: "") -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def metric(http: str, name: str, **labels: str) -> float:
    """Sum of the samples that carry these labels."""
    with httpx.Client(trust_env=False, timeout=SECONDS) as client:
        text = client.get(f"http://{http}/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


class FleetProcess:
    """Always at the same addresses, with its store in `folder`."""

    def __init__(self, folder: Path, url: str, **settings: object) -> None:
        folder.mkdir(exist_ok=True)
        self.store = folder / "fleet" / "fleet.db"
        self.log = folder / "fleet.log"
        self.address, self.http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        addresses = {"grpc": self.address, "http": self.http, "fleet_store": self.store, "nats": url}
        self._settings = {**addresses, "fleet_name": folder.name, "shutdown_grace_seconds": 1, **settings}
        self.process: subprocess.Popen[str] | None = None

    def start(self, ready: bool = True) -> "FleetProcess":
        """Returns when it is ready, or if that is not asked for, when it listens."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self._settings.items()]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stream_monitor", "fleet", *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert re.match(r"listening: grpc \S+, http \S+", line), self.log.read_text()
        self.channel = grpc.insecure_channel(self.address, LOCAL)
        self.api = monitor_pb2_grpc.MonitorServiceStub(self.channel)
        if ready:
            until(self.is_ready, self.log.read_text)
        return self

    def is_ready(self) -> bool:
        with httpx.Client(trust_env=False, timeout=SECONDS) as client:
            return client.get(f"http://{self.http}/readyz").status_code == 200

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

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.http, f"stream_monitor_fleet_{name}", **labels)

    def follow(self, cursor: str = "") -> Iterator[monitor_pb2.SubscribeResponse]:
        """A subscription, its first response, which has no event, included."""
        stream = self.api.Subscribe(monitor_pb2.SubscribeRequest(cursor=cursor), timeout=SECONDS)
        return iter(stream)

    def ids(self) -> list[str]:
        """External ids of all requests it lists, newest first."""
        return [each.external_id for each in self.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests]

    def read(self, cursor: str, count: int) -> tuple[list[str], str]:
        """External ids of the next findings, none of them lost, and the cursor after the last."""
        stream = self.follow(cursor)
        next(stream)
        found = []
        for _ in range(count):
            response = next(stream)
            assert response.lost == 0
            found.append(response.event.external_id)
            cursor = response.cursor
        return found, cursor
