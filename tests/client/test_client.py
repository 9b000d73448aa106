"""The Python client against a real monitor, killed and started again where that is the point."""

import asyncio
import doctest
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from stream_monitor.client import AsyncMonitor, Monitor, MonitorError, Received, aio, blocking
from stream_monitor.client.subscription import FIRST_SECONDS, LONGEST_SECONDS, Subscription
from stream_monitor.monitor.service import MonitorService
from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.conftest import Running, starter
from tests.monitor.process import MonitorProcess
from tests.monitor.synthetic import Engine
from tests.monitor.test_service import SHIFTING, matrix

CHAT = "chatcmpl-my-req-1-aee6d49e"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    yield from starter(tmp_path)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[MonitorProcess]:
    running = MonitorProcess(tmp_path)
    yield running
    running.kill()


class Following:
    """A subscription in a thread, and what it was told."""

    def __init__(self, monitor: Monitor, **asked: object) -> None:
        self.received: list[Received] = []
        self.notes: list[str] = []
        self._thread = threading.Thread(target=self._follow, args=(monitor, asked), daemon=True)
        self._thread.start()

    def _follow(self, monitor: Monitor, asked: dict[str, object]) -> None:
        for received in monitor.subscribe(notify=self.notes.append, **asked):  # type: ignore[arg-type]
            self.received.append(received)

    def names(self, count: int) -> list[str]:
        """Requests of the first events, once there are as many."""
        deadline = time.monotonic() + 20
        while len(self.received) < count:
            assert time.monotonic() < deadline, (self.received, self.notes)
            time.sleep(0.02)
        return [received.event.external_id for received in self.received]

    def join(self) -> bool:
        self._thread.join(5)
        return not self._thread.is_alive()


def test_a_subscription_outlives_a_kill_and_a_stop(process: MonitorProcess) -> None:
    rank = Engine()
    with Monitor(process.address) as monitor:
        following = Following(monitor, last=5)
        process.publish(rank.request("a-aaaaaaaa", SHIFTING))
        assert following.names(1) == ["a"]
        for name, end in (("b", process.kill), ("c", process.stop)):
            end()
            process.start()
            process.publish(rank.request(f"{name}-aaaaaaaa", SHIFTING))
            following.names(2 if name == "b" else 3)
        assert following.names(3) == ["a", "b", "c"]
        assert [(received.lost, received.gap) for received in following.received] == [(0, "")] * 3
        assert len([note for note in following.notes if note.startswith("no answer from the monitor at")]) == 2
    assert following.join()


def test_a_monitor_that_forgot_leaves_a_gap_that_is_told(process: MonitorProcess) -> None:
    rank = Engine()
    with Monitor(process.address) as monitor:
        following = Following(monitor, last=5)
        process.publish(rank.request("a-aaaaaaaa", SHIFTING))
        following.names(1)
        process.kill()
        for path in process.store.parent.iterdir():
            path.unlink()
        process.start()
        process.publish(rank.request("b-aaaaaaaa", SHIFTING))
        assert following.names(2) == ["a", "b"]
    assert following.received[0].gap == ""
    assert "of another monitor start or store" in following.received[1].gap
    assert any("events before it are missing" in note for note in following.notes)


def test_what_a_slow_reader_loses_is_told(run: Callable[..., Running]) -> None:
    monitor = run(subscriber_queue=4)

    async def slow() -> list[tuple[str, int]]:
        async with AsyncMonitor(monitor.server.grpc_address) as client:
            events = client.subscribe()
            first = asyncio.ensure_future(anext(events))
            while not monitor.server.log.subscribers:
                await asyncio.sleep(0.01)

            def flood() -> None:
                for number in range(10):
                    event = monitor_pb2.Event(kind=monitor_pb2.EVENT_KIND_ANCHOR_SHIFT, summary=str(number))
                    monitor.server.log.publish(event)

            monitor.loop.call_soon_threadsafe(flood)
            found = [await first] + [await anext(events) for _ in range(3)]
            return [(received.event.summary, received.lost) for received in found]

    assert asyncio.run(slow()) == [("6", 6), ("7", 0), ("8", 0), ("9", 0)]


def test_filters_and_what_is_refused(run: Callable[..., Running]) -> None:
    monitor = run()
    monitor.publish(Engine().request(CHAT, SHIFTING))
    with Monitor(monitor.server.grpc_address) as client:
        received = next(client.subscribe(kinds=["Anchor-Shift"], minimum_severity="warning", last=1))
        assert received.event.external_id == "chatcmpl-my-req-1"
        with pytest.raises(ValueError, match="no such kind 'shift'; valid: anchor_shift, "):
            client.subscribe(kinds=["shift"])
        with pytest.raises(ValueError, match="no such severity 'fatal'; valid: info, warning, critical"):
            client.subscribe(minimum_severity="fatal")
        with pytest.raises(MonitorError, match="cursor is not one that this service gave out") as refused:
            next(client.subscribe(cursor="!"))
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(MonitorError, match="no trace of request 'none'") as missing:
            client.get_trace("none")
        assert missing.value.code is grpc.StatusCode.NOT_FOUND
    with (
        Monitor("127.0.0.1:1") as nobody,
        pytest.raises(MonitorError, match=r"no monitor at 127\.0\.0\.1:1; start one"),
    ):
        list(nobody.list_requests())


def test_traces_lists_and_deletion(run: Callable[..., Running], tmp_path: Path) -> None:
    monitor = run(grpc=f"unix:{tmp_path / 'ingest.sock'}")
    rank = Engine()
    monitor.publish([message for index in range(7) for message in rank.request(f"r{index}-aaaaaaaa", [4] * 6)])
    with Monitor(monitor.server.grpc_address) as client:
        names = [info.external_id for info in client.list_requests(page_size=3)]
        assert names == [f"r{index}" for index in reversed(range(7))]
        trace = client.get_trace("r3", with_heads=True)
        raw = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="r3"))
        assert np.array_equal(trace.matrix.dense(len(trace.sentences)), matrix(raw).astype(np.float32))
        assert trace.captured_rows.tolist() == [0] * 8 + [3] * 6
        assert trace.row_positions.tolist() == [48 + 6 * i + o for i in range(6) for o in (0, 2, 4)]
        assert len(trace.by_head.head) == len(trace.by_head.share) > 0
        assert set(trace.by_head.head) <= set(range(len(trace.heads)))
        assert len(client.get_trace("r3").by_head.head) == 0
        assert [key.request_id for key in client.delete_request("r3")] == ["r3-aaaaaaaa"]
        assert "r3" not in [info.external_id for info in client.list_requests()]

    async def asked() -> list[str]:
        async with AsyncMonitor(monitor.server.grpc_address) as client:
            assert (await client.get_trace("r2")).info.external_id == "r2"
            await client.delete_request("r2")
            return [info.external_id async for info in client.list_requests(page_size=2)]

    assert asyncio.run(asked()) == ["r6", "r5", "r4", "r1", "r0"]


def test_closing_ends_a_subscription(run: Callable[..., Running]) -> None:
    monitor = run()
    client = Monitor(monitor.server.grpc_address)
    following = Following(client)
    while not monitor.server.log.subscribers:
        time.sleep(0.01)
    client.close()
    assert following.join()


def test_the_token_goes_along(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    answer = MonitorService.ListRequests

    async def looked(self: MonitorService, request: object, context: grpc.aio.ServicerContext) -> object:
        seen.append(dict(context.invocation_metadata() or ()).get("authorization"))
        return await answer(self, request, context)  # type: ignore[arg-type]

    monkeypatch.setattr(MonitorService, "ListRequests", looked)
    monitor = run()
    for token in ("secret", None):
        with Monitor(monitor.server.grpc_address, token=token) as client:
            list(client.list_requests())
    assert seen == ["Bearer secret", None]


def test_waits_grow_to_a_limit_with_jitter() -> None:
    asked = Subscription("x", (), (), (), (), "", "", 0, None)
    waits = [asked.ended() for _ in range(40)]
    assert FIRST_SECONDS / 2 <= waits[0] <= FIRST_SECONDS
    assert all(LONGEST_SECONDS / 2 <= wait <= LONGEST_SECONDS for wait in waits[10:])
    assert len(set(waits[10:])) > 20


@pytest.mark.parametrize("module", [blocking, aio], ids=["blocking", "aio"])
def test_the_examples_of_the_docstrings_run(run: Callable[..., Running], module: object) -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    ran = 0
    for test in finder.find(module):
        if not test.examples:
            continue
        monitor = run(ingest="unix:" + str(Path("/tmp") / f"stream-monitor-doctest-{id(test)}" / "i.sock"))
        monitor.publish(Engine().request(CHAT, SHIFTING))
        for example in test.examples:
            example.source = example.source.replace("127.0.0.1:9750", monitor.server.grpc_address)
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert results.failed == 0
        ran += results.attempted
        monitor.stop()
    assert ran >= 4
