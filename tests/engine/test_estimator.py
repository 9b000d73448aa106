"""The estimator thread over a real search and a real ring: what it counts of its own work."""

import os
import time
from collections.abc import Collection

import numpy as np
import pytest
import torch

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
from stream_monitor.records import Ledger, Phase, QueueState, decode
from stream_monitor.ring import RingReader, RingWriter

PAGE, HEADS, KV_HEADS, DIM, PAGES = 32, 4, 2, 16, 12
CONTEXTS = (40, 70)
FLOAT32 = 4
QUEUES = [QueueState("estimator", 1, 4)]


class Rig:
    """An estimator over a search of two rows, and what came out at the other end of its ring."""

    def __init__(self, watched: tuple[int, ...] = (0, 1, 2, 3), cpus: Collection[int] = ()) -> None:
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
        self.ring = RingWriter(1 << 16)
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
        self.estimator.stop(60)
        assert self.faults == []
        reader = RingReader(self.ring.fd)
        payloads = []
        while record := reader.read():
            payloads.append(record.payload)
        reader.close()
        self.ring.close()
        return payloads


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
