"""The estimator thread over a real search and a real ring: what it counts of its own work."""

import os
import time
from collections.abc import Collection

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from stream_kernels.cpu import ROW_RACED, CpuSearch
from stream_kernels.layout import KeyLayout, PagedKeys
from stream_kernels.search import BlockSummary, SearchConfig
from stream_monitor.engine import estimator
from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.cpu.device import CpuRowSearch
from stream_monitor.engine.cpu.slots import CpuSlot, LayerTap
from stream_monitor.engine.estimator import Estimator
from stream_monitor.engine.requests import RowLabel
from stream_monitor.engine.steps import Job
from stream_monitor.records import Ledger, Phase, QueueState, RequestFinished, RequestStarted, TokenRun, decode
from stream_monitor.ring import Record, RingReader, RingWriter

PAGE, HEADS, KV_HEADS, DIM, PAGES = 32, 4, 2, 16, 12
CONTEXTS = (40, 70)
FLOAT32 = 4
QUEUES = [QueueState("estimator", 1, 4)]


class Rig:
    """An estimator over a search of two rows, and what came out at the other end of its ring."""

    def __init__(
        self, watched: tuple[int, ...] = (0, 1, 2, 3), cpus: Collection[int] = (), ring_bytes: int = 1 << 16
    ) -> None:
        cache = PagedKeys(torch.randn(PAGES, KV_HEADS, PAGE, 2 * DIM), KeyLayout.row_major(PAGE, DIM), 1.0)
        config = SearchConfig(strategy="exact", top_k=2)
        search = CpuSearch(
            [cache],
            HEADS,
            config,
            max_rows=2,
            max_context=PAGES * PAGE,
            query_dtype=torch.float32,
            query_heads=watched,
        )
        self.slot = CpuSlot([LayerTap(0)], 2, HEADS, DIM, [PAGES], torch.float32)
        self.slot.queries.normal_()
        self.slot.labels = [RowLabel(f"r{n}", size - 1, 0, Phase.DECODE, "", True) for n, size in enumerate(CONTEXTS)]
        self.slot.batch_rows[:], self.slot.contexts[:], self.slot.generations[:] = (0, 1), CONTEXTS, 1
        self.slot.tables[0][:] = np.arange(PAGES)
        self.ring = RingWriter(ring_bytes)
        self.faults: list[str] = []
        self.estimator = Estimator(
            CpuRowSearch(search, BlockSummary.allocate(1, 2, len(watched), config), BlockGenerations(PAGES)),
            len(watched),
            DIM * FLOAT32,
            self.ring,
            audit_every=0,
            cpus=set(cpus),
            release=lambda slot: None,
            on_fault=self.faults.append,
            after_job=lambda: None,
        )
        self.estimator.start()

    def submit(self, step: int) -> None:
        self.estimator.submit(Job(step, 1, Ledger(queues=QUEUES), self.slot))

    def end(self) -> list[bytes]:
        """The records that were written."""
        return [record.payload for record in self.read()]

    def read(self) -> list[Record]:
        """The same with what the ring says of them."""
        self.estimator.stop(60)
        assert self.faults == []
        reader = RingReader(self.ring.fd)
        records = list(iter(reader.read, None))
        reader.close()
        self.ring.close()
        return records


@pytest.mark.parametrize("watched", [(0, 1, 2, 3), (1,)])
def test_bytes_read_and_written_are_counted(watched: tuple[int, ...]) -> None:
    rig = Rig(watched)
    rig.submit(1)
    rig.submit(2)
    payloads = rig.end()
    first, second = (decode(payload).ledger for payload in payloads)
    # Every key of every KV head that a watched query head reads, once for all heads that share it.
    read_heads = len({head // (HEADS // KV_HEADS) for head in watched})
    assert first.key_bytes == sum(CONTEXTS) * read_heads * DIM * FLOAT32
    assert second.key_bytes == 2 * first.key_bytes
    # A record cannot hold its own length: it tells of those before.
    assert (first.record_bytes, second.record_bytes) == (0, len(payloads[0]))
    assert second.queues == QUEUES


def test_time_that_a_search_sleeps_takes_no_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, for which the thread waits."""
    rig = Rig()

    def search(slot: CpuSlot) -> np.ndarray:
        time.sleep(0.05)
        begin = time.thread_time()
        while time.thread_time() - begin < 0.01:
            pass
        return np.full(len(slot.labels), ROW_RACED, np.uint8)

    monkeypatch.setattr(rig.estimator._search, "run", search)
    rig.submit(1)
    assert rig.estimator.drain(30)
    assert 0.01 <= rig.estimator.processor_seconds < 0.05
    assert rig.estimator.ledger.estimate_seconds >= 0.06
    rig.end()


def test_on_the_core_processs_cpu_a_search_waits_for_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator, "STEP_SECONDS", 60.0)
    rig = Rig(cpus={min(os.sched_getaffinity(0))})
    rig.estimator.step_begun()
    rig.submit(1)
    assert not rig.estimator.drain(0.3)
    rig.estimator.step_begun()
    assert rig.estimator.drain(30)
    # One that is behind does not wait: of these two the newest alone does.
    rig.submit(2)
    rig.submit(3)
    rig.estimator.step_begun()
    assert rig.estimator.drain(30)
    assert [decode(payload).step for payload in rig.end()] == [1, 2, 3]


def test_but_no_longer_than_a_step_may_take() -> None:
    rig = Rig(cpus={min(os.sched_getaffinity(0))})
    rig.submit(1)
    assert rig.estimator.drain(30)
    assert len(rig.end()) == 1


def test_with_cpus_of_its_own_it_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator, "STEP_SECONDS", 60.0)
    rig = Rig(cpus={min(os.sched_getaffinity(0)), 1 << 10})
    rig.submit(1)
    assert rig.estimator.drain(30)
    assert len(rig.end()) == 1


def test_rows_too_large_for_the_ring_are_dropped_and_what_is_said_of_requests_is_not() -> None:
    rig = Rig(ring_bytes=4096)
    rig.slot.labels = [replace(label, request_id=label.request_id.ljust(1024, "x")) for label in rig.slot.labels]
    started = [RequestStarted("r", 3, b"", b"", bytes(3))]
    tokens, finished = [TokenRun("r", 3, bytes(1500))], [RequestFinished("r", 1503)]
    rig.estimator.submit(Job(1, 1, Ledger(), rig.slot, started, tokens, finished))
    (payload,) = rig.end()
    record = decode(payload)
    assert (record.step, record.rows, record.more) == (0, None, False)
    assert (record.started, record.tokens, record.finished) == (started, tokens, finished)
    rows = record.ledger.token_rows
    assert (rows.captured, rows.dropped) == (0, {"record_too_large": 2 * HEADS})


def test_what_is_said_of_requests_is_missing_by_number_where_it_is_too_large_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig()
    rig.submit(1)
    rig.estimator.submit(Job(2, 1, Ledger(), None, [RequestStarted("r", 1 << 17, b"", b"", bytes(1 << 17))]))
    rig.submit(3)
    first, second = rig.read()
    assert (first.mark.sequence, second.mark.sequence) == (1, 3)
    assert (second.lost_records, second.lost_token_rows) == (1, 0)
    assert "what step 2 says of requests is larger than the ring and lost" in caplog.text
