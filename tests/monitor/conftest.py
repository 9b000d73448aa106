"""A real monitor on real sockets, driven from blocking test code."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from stream_monitor.config import MonitorSettings
from stream_monitor.monitor.server import MonitorServer
from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc, monitor_pb2_grpc, summary_pb2

TIMEOUT = 10


class Running:
    """A monitor on an event loop of its own, and clients of it."""

    def __init__(self, settings: MonitorSettings) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = MonitorServer(settings, "test")
        self.call(self.server.start())
        self.ingest_channel = grpc.insecure_channel(
            self.server.ingest_address, [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        )
        self.channel = grpc.insecure_channel(self.server.grpc_address, [("grpc.use_local_subchannel_pool", 1)])
        self.api = monitor_pb2_grpc.MonitorServiceStub(self.channel)
        self.stopped = False

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(TIMEOUT)

    def publish(self, summaries: Sequence[summary_pb2.StepSummary]) -> list[ingest_pb2.PublishResponse]:
        """One stream; returns all answers."""
        stub = ingest_pb2_grpc.IngestServiceStub(self.ingest_channel)
        requests = (ingest_pb2.PublishRequest(summary=summary) for summary in summaries)
        return list(stub.Publish(requests, timeout=TIMEOUT))

    def publish_raw(self, messages: Sequence[bytes]) -> list[ingest_pb2.PublishResponse]:
        """One stream of arbitrary bytes."""
        method = self.ingest_channel.stream_stream(
            "/stream_monitor.v1alpha1.IngestService/Publish",
            request_serializer=None,
            response_deserializer=ingest_pb2.PublishResponse.FromString,
        )
        return list(method(iter(messages), timeout=TIMEOUT))

    def http(self, path: str, accept: str = "text/plain") -> httpx.Response:
        with httpx.Client(trust_env=False, timeout=TIMEOUT) as client:
            return client.get(f"http://{self.server.http_address}{path}", headers={"accept": accept})

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples that carry these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        return sum(
            sample.value
            for family in text_string_to_metric_families(self.http("/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            self.call(self.server.stop())
        self.ingest_channel.close()
        self.channel.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(TIMEOUT)


class Stream:
    """A publisher that sends one message at a time."""

    def __init__(self, monitor: Running) -> None:
        self._requests: queue.SimpleQueue[ingest_pb2.PublishRequest | None] = queue.SimpleQueue()
        stub = ingest_pb2_grpc.IngestServiceStub(monitor.ingest_channel)
        self._answers: Iterator[ingest_pb2.PublishResponse] = stub.Publish(
            iter(self._requests.get, None), timeout=TIMEOUT
        )

    def send(self, summary: summary_pb2.StepSummary) -> ingest_pb2.PublishResponse:
        self._requests.put(ingest_pb2.PublishRequest(summary=summary))
        return next(self._answers)

    def close(self) -> None:
        self._requests.put(None)
        assert list(self._answers) == []


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def starter(folder: Path) -> Iterator[Callable[..., Running]]:
    """Starts monitors, settings given by name, and stops them all at the end."""
    running: list[Running] = []

    def start(**settings: Any) -> Running:
        defaults = {
            "ingest": f"unix:{folder / 'ingest.sock'}",
            "grpc": "127.0.0.1:0",
            "http": "127.0.0.1:0",
            "store": "",
            "shutdown_grace_seconds": 1,
        }
        running.append(Running(MonitorSettings(**(defaults | settings))))
        return running[-1]

    yield start
    for each in running:
        each.stop()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts monitors."""
    yield from starter(tmp_path)


@pytest.fixture
def monitor(run: Callable[..., Running]) -> Running:
    """A monitor at default limits."""
    return run()


@pytest.fixture(scope="module")
def shared_monitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One monitor for all tests of a module that only look at what changed."""
    for start in starter(tmp_path_factory.mktemp("shared")):
        yield start()
