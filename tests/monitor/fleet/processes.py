"""A process of the fleet, which a test may kill and start again, and how to wait for what it shows."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.process import Served, free_port

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


class FleetProcess(Served):
    """One with its store in `folder`."""

    def __init__(self, folder: Path, url: str, **settings: object) -> None:
        folder.mkdir(exist_ok=True)
        self.store = folder / "fleet" / "fleet.db"
        self.address, self.http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        addresses = {"grpc": self.address, "http": self.http, "fleet_store": self.store, "nats": url}
        super().__init__(
            "fleet", "listening: grpc ", folder / "fleet.log", {**addresses, "fleet_name": folder.name, **settings}
        )

    def start(self, ready: bool = True) -> "FleetProcess":
        """Returns when it is ready, or if that is not asked for, when it listens."""
        self.run()
        if ready:
            until(self.is_ready, self.log.read_text)
        return self

    def is_ready(self) -> bool:
        with httpx.Client(trust_env=False, timeout=SECONDS) as client:
            return client.get(f"http://{self.http}/readyz").status_code == 200

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
