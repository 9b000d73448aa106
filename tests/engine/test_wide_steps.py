"""Steps of many requests with many heads, through the real search, estimator, publisher and monitor."""

import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from stream_kernels.cpu import CpuSearch
from stream_kernels.layout import KeyLayout, PagedKeys
from stream_kernels.search import BlockSummary, SearchConfig
from stream_monitor.engine import splitting
from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.cpu.device import CpuRowSearch
from stream_monitor.engine.cpu.slots import CpuSlot, LayerTap
from stream_monitor.engine.estimator import Estimator
from stream_monitor.engine.ledger import count
from stream_monitor.engine.requests import RowLabel
from stream_monitor.engine.steps import Job
from stream_monitor.monitor import front
from stream_monitor.publisher.launch import PublisherProcess
from stream_monitor.records import EngineInfo, Geometry, Ledger, Phase, RequestFinished, RequestStarted, TokenRun
from stream_monitor.ring import RingWriter
from stream_monitor.target import Target
from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.conftest import Running, starter, until
from tests.monitor.fleet.processes import metric
from tests.monitor.process import MonitorProcess
from tests.monitor.synthetic import SENTENCE

LAYERS, HEADS, DIM, PAGE, PAGES, PROMPT = 24, 16, 16, 32, 12, 36
WIDE = LAYERS * HEADS
TAIL = "-aaaaaaaa"
"""Of internal request ids."""
CONFIG = SearchConfig(strategy="exact", top_k=8)
REQUESTS = 200
"""186 rows of 384 heads are the most that 4 MiB hold."""


class WideEngine:
    """An engine that watches a whole model of 24 layers, in front of a ring with its publisher."""

    def __init__(self, target: str, instance: str) -> None:
        info = EngineInfo(
            instance, "wide", "0", 0, 0, 1, 0, 1, list(range(LAYERS)), 0, HEADS, list(range(HEADS)),
            Geometry(PAGE, CONFIG.top_k, CONFIG.sink_blocks, CONFIG.recent_blocks, CONFIG.strategy), "0", "0",
        )  # fmt: skip
        drawn = torch.Generator().manual_seed(0)
        cache = PagedKeys(
            torch.randn(PAGES, HEADS, PAGE, 2 * DIM, generator=drawn), KeyLayout.row_major(PAGE, DIM), 1.0
        )
        search = CpuSearch(
            [cache] * LAYERS, HEADS, CONFIG, max_rows=REQUESTS, max_context=PAGES * PAGE, query_dtype=torch.float32
        )
        self.ring = RingWriter(64 << 20)
        self.ledger = Ledger()
        self.faults: list[str] = []
        self._slot = CpuSlot([LayerTap(layer) for layer in range(LAYERS)], REQUESTS, HEADS, DIM, [PAGES], torch.float32)
        self._slot.queries.normal_(generator=drawn)
        self._slot.batch_rows[:] = np.arange(REQUESTS)
        self._slot.generations[:] = 1
        self._slot.tables[0][:] = np.arange(PAGES)
        self._estimator = Estimator(
            CpuRowSearch(
                search, BlockSummary.allocate(LAYERS, REQUESTS, HEADS, CONFIG), BlockGenerations(PAGES)
            ),
            WIDE, DIM * 4, self.ring, audit_every=1, cpus=set(), release=lambda slot: None,
            on_fault=self.faults.append, after_job=lambda: None,
        )  # fmt: skip
        self._estimator.start()
        self.publisher = PublisherProcess(self.ring.fd, info, Target(target))
        self.publisher.start()

    def run(self, rows_of: dict[str, int], steps: int = 3) -> None:
        """Requests from begin to end, of each so many rows in every step; each row samples a sentence."""
        starts = [
            RequestStarted(name, PROMPT, bytes(4), b"\2", SENTENCE * (PROMPT // len(SENTENCE))) for name in rows_of
        ]
        for step in range(steps):
            labels = [
                RowLabel(name, PROMPT - 1 + len(SENTENCE) * (step * rows + row), 0, Phase.DECODE, "", True)
                for name, rows in rows_of.items()
                for row in range(rows)
            ]
            count(self.ledger, labels, "expected", "", WIDE)
            self._slot.labels = labels
            self._slot.contexts[: len(labels)] = [label.position + 1 for label in labels]
            runs = [TokenRun(label.request_id, label.position + 1, SENTENCE) for label in labels]
            self._estimator.submit(Job(step + 1, step + 1, self.ledger, self._slot, starts, runs))
            assert self._estimator.drain(60)
            starts = []
        ends = [RequestFinished(name, PROMPT + len(SENTENCE) * steps * rows) for name, rows in rows_of.items()]
        self._estimator.submit(Job(steps, steps + 1, self.ledger, finished=ends))
        assert self._estimator.drain(60)
        assert self.faults == []

    def close(self) -> None:
        self._estimator.stop(10)
        self.publisher.stop(10)
        self.ring.close()


class Told:
    """What a monitor made of an engine's run."""

    def __init__(self, monitor: MonitorProcess | Running) -> None:
        self._http = monitor.http if isinstance(monitor, MonitorProcess) else monitor.server.http_address
        self._api = monitor.api

    def metric(self, name: str, **labels: str) -> float:
        return metric(self._http, f"stream_monitor_{name}", **labels)

    def wait(self, rows_of: dict[str, int], refused: Collection[str] = ()) -> None:
        """Until all is said: of some all rows were refused for their size, of the others none was lost."""
        lost = sum(3 * rows_of[name] * WIDE for name in refused)
        expected = 3 * sum(rows_of.values()) * WIDE
        account = {
            ("rows_expected_total", ""): expected,
            ("rows_total", "captured"): expected - lost,
            ("rows_total", "refused"): lost,
        }
        told = dict.fromkeys(account, -1.0)

        def true() -> bool:
            for name, outcome in account:
                told[name, outcome] = self.metric(name, **({"outcome": outcome} if outcome else {}))
            # Of a request whose messages were refused nothing is known.
            ended = self.metric("requests_finished_total")
            return told == account and ended == len(rows_of) - len(refused)

        until(true, 60)
        assert self.metric("rows_total", reason="monitor_resource_exhausted") == lost
        assert self.metric("messages_lost_total") <= 3 * len(refused)

    def trace(self, name: str) -> monitor_pb2.GetTraceResponse:
        external = name.removesuffix(TAIL)
        return self._api.GetTrace(monitor_pb2.GetTraceRequest(request_id=external, with_heads=True), timeout=20)


@contextmanager
def told(monitor: MonitorProcess | Running, rows_of: dict[str, int], instance: str = "") -> Iterator[Told]:
    """What a monitor makes of an engine that did this."""
    address = monitor.ingest if isinstance(monitor, MonitorProcess) else monitor.server.ingest_address
    engine = WideEngine(address, instance or str(uuid.uuid4()))
    try:
        engine.run(rows_of)
        yield Told(monitor)
    finally:
        engine.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., MonitorProcess]]:
    """Starts monitors in processes of their own."""
    running: list[MonitorProcess] = []

    def start(**settings: object) -> MonitorProcess:
        folder = tmp_path / str(len(running))
        folder.mkdir(mode=0o700)
        running.append(MonitorProcess(folder, **settings))
        return running[-1]

    yield start
    for monitor in running:
        monitor.kill()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts monitors in this process."""
    yield from starter(tmp_path)


MANY = {f"r{number}{TAIL}": 1 for number in range(REQUESTS)}
ONE, LARGE, TWO = f"one{TAIL}", f"large{TAIL}", f"two{TAIL}"


def test_what_is_sent_in_parts_arrives_as_if_it_were_one(
    compiled_search: None, serve: Callable[..., MonitorProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = str(uuid.uuid4())
    with told(serve(), MANY, instance) as parts:
        parts.wait(MANY)
        # 4.4 MB of rows in each of three steps, and the end.
        assert parts.metric("messages_total") == parts.metric("messages_total", outcome="accepted") == 3 * 3 + 1
        assert parts.metric("steps_total") == 3
        monkeypatch.setattr(splitting, "MESSAGE_BYTES", 1 << 30)
        with told(serve(max_message_bytes=64 << 20), MANY, instance) as whole:
            whole.wait(MANY)
            assert whole.metric("messages_total", outcome="accepted") == 3 + 1
            for name in MANY:
                trace = parts.trace(name)
                assert (trace.info.rows_kept, trace.info.state) == (3, monitor_pb2.REQUEST_STATE_FINISHED)
                assert trace == whole.trace(name)


def test_unsplit_the_same_steps_are_refused(
    compiled_search: None, serve: Callable[..., MonitorProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "MESSAGE_BYTES", 1 << 30)
    with told(serve(), MANY) as whole:
        refused = 3 * REQUESTS * WIDE
        until(lambda: whole.metric("rows_total", reason="monitor_resource_exhausted") == refused, 60)
        assert whole.metric("messages_total", outcome="invalid", reason="oversized") >= 3


def test_what_one_request_has_in_a_step_arrives_in_parts_as_if_it_were_one(
    compiled_search: None, serve: Callable[..., MonitorProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = str(uuid.uuid4())
    rows_of = {ONE: 1, LARGE: 7, TWO: 1}
    with told(serve(), rows_of, instance) as whole:
        whole.wait(rows_of)
        assert whole.metric("messages_total", outcome="accepted") == 3 + 1
        monkeypatch.setattr(splitting, "MESSAGE_BYTES", 50_000)  # two rows
        with told(serve(max_message_bytes=1 << 16), rows_of, instance) as parts:
            parts.wait(rows_of)
            assert parts.metric("messages_total", outcome="accepted") == 3 * 5 + 1
            assert parts.metric("steps_total") == 3
            for name in rows_of:
                assert parts.trace(name) == whole.trace(name)


def test_a_message_that_is_too_large_is_refused_and_its_neighbours_are_not(
    compiled_search: None, serve: Callable[..., MonitorProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "MESSAGE_BYTES", 100_000)
    rows_of = {ONE: 1, LARGE: 4, TWO: 1}
    with told(serve(max_message_bytes=1 << 16), rows_of) as parts:
        parts.wait(rows_of, refused=[LARGE])
        assert parts.metric("messages_total", outcome="invalid", reason="oversized") >= 3
        assert [parts.trace(name).info.rows_kept for name in (ONE, TWO)] == [3, 3]


def test_what_the_transport_refuses_is_in_the_account_all_the_same(
    compiled_search: None, run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "MESSAGE_BYTES", 350_000)
    monkeypatch.setattr(front, "TRANSPORT_BYTES", 0)  # so that it is four times the monitor's own
    rows_of = {ONE: 1, LARGE: 16, TWO: 1}
    with told(run(max_message_bytes=1 << 16), rows_of) as parts:
        parts.wait(rows_of, refused=[LARGE])
        assert parts.metric("messages_total", reason="oversized") == 0, "nobody told the monitor"
