"""Steps of many requests with many heads, through the real search, estimator, publisher and monitor."""

import uuid
from collections.abc import Iterator
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
from stream_monitor.publisher.launch import PublisherProcess
from stream_monitor.records import EngineInfo, Geometry, Ledger, Phase, RequestFinished, RequestStarted, TokenRun
from stream_monitor.ring import RingWriter
from stream_monitor.target import Target
from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.conftest import until
from tests.monitor.fleet.processes import metric
from tests.monitor.process import MonitorProcess
from tests.monitor.synthetic import SENTENCE

LAYERS, HEADS, DIM, PAGE, PAGES, PROMPT = 24, 16, 16, 32, 4, 36
WIDE = LAYERS * HEADS
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

    def __init__(self, monitor: MonitorProcess) -> None:
        self._monitor = monitor

    def metric(self, name: str, **labels: str) -> float:
        return metric(self._monitor.http, f"stream_monitor_{name}", **labels)

    def trace(self, name: str) -> monitor_pb2.GetTraceResponse:
        return self._monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id=name, with_heads=True), timeout=20)


@contextmanager
def told(folder: Path, rows_of: dict[str, int], instance: str = "", **settings: object) -> Iterator[Told]:
    """A monitor to which an engine told all that it did with requests of so many rows a step."""
    folder.mkdir()
    folder.chmod(0o700)
    monitor = MonitorProcess(folder, **settings)
    engine = WideEngine(monitor.ingest, instance or str(uuid.uuid4()))
    try:
        engine.run(rows_of)
        asked = Told(monitor)
        expected = 3 * sum(rows_of.values()) * WIDE
        until(lambda: asked.metric("rows_total") == expected, 60)
        assert asked.metric("rows_expected_total") == expected
        yield asked
    finally:
        engine.close()
        monitor.kill()


def test_what_is_sent_in_parts_arrives_as_if_it_were_one(
    compiled_search: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of = {f"r{number}-aaaaaaaa": 1 for number in range(REQUESTS)}
    instance = str(uuid.uuid4())
    with told(tmp_path / "parts", rows_of, instance) as parts:
        assert parts.metric("rows_total", outcome="captured") == 3 * REQUESTS * WIDE
        assert parts.metric("messages_total", outcome="accepted") > 4
        assert parts.metric("messages_lost_total") == 0
        assert parts.metric("steps_total") == 3
        monkeypatch.setattr(splitting, "MESSAGE_BYTES", 1 << 30)
        with told(tmp_path / "whole", rows_of, instance, max_message_bytes=64 << 20) as whole:
            assert whole.metric("messages_total", outcome="accepted") == 4
            for name in rows_of:
                external = name.removesuffix("-aaaaaaaa")
                trace = parts.trace(external)
                assert (trace.info.rows_kept, trace.info.state) == (3, monitor_pb2.REQUEST_STATE_FINISHED)
                assert trace == whole.trace(external)


def test_unsplit_the_same_steps_are_refused(
    compiled_search: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "MESSAGE_BYTES", 1 << 30)
    with told(tmp_path / "whole", {f"r{number}-aaaaaaaa": 1 for number in range(REQUESTS)}) as whole:
        refused = whole.metric("rows_total", outcome="refused", reason="monitor_resource_exhausted")
        assert refused == 3 * REQUESTS * WIDE


def test_a_request_that_is_too_large_alone_is_refused_and_its_neighbours_are_not(
    compiled_search: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "MESSAGE_BYTES", 50_000)
    rows_of = {"one-aaaaaaaa": 1, "large-aaaaaaaa": 4, "two-aaaaaaaa": 1}
    with told(tmp_path / "parts", rows_of, max_message_bytes=1 << 16) as parts:
        assert parts.metric("rows_total", outcome="captured") == 3 * 2 * WIDE
        refused = parts.metric("rows_total", outcome="refused", reason="monitor_resource_exhausted")
        assert refused == 3 * 4 * WIDE
        assert parts.metric("messages_total", outcome="invalid", reason="oversized") >= 3
        for name in ("one", "two"):
            assert parts.trace(name).info.rows_kept == 3
