"""The estimator thread over a real search and a real ring: what it counts of its own work."""

import numpy as np
import pytest
import torch

from stream_kernels.cpu import CpuSearch
from stream_kernels.layout import KeyLayout, PagedKeys
from stream_kernels.search import BlockSummary, SearchConfig
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


@pytest.mark.parametrize("watched", [(0, 1, 2, 3), (1,)])
def test_bytes_read_and_written_are_counted(watched: tuple[int, ...]) -> None:
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
    slot = CpuSlot([LayerTap(0)], 2, HEADS, DIM, [PAGES], torch.float32)
    slot.queries.normal_()
    slot.labels = [RowLabel(f"r{n}", length - 1, 0, Phase.DECODE, "", True) for n, length in enumerate(CONTEXTS)]
    slot.batch_rows[:], slot.contexts[:], slot.generations[:] = (0, 1), CONTEXTS, 1
    slot.tables[0][:] = np.arange(PAGES)
    ring = RingWriter(1 << 16)
    faults: list[str] = []
    estimator = Estimator(
        CpuRowSearch(search, BlockSummary.allocate(1, 2, len(watched), config), BlockGenerations(PAGES)),
        len(watched),
        DIM * FLOAT32,
        ring,
        audit_every=0,
        cpus=set(),
        release=lambda slot: None,
        on_fault=faults.append,
        after_job=lambda: None,
    )
    estimator.start()
    queues = [QueueState("estimator", 1, 4)]
    for step in (1, 2):
        estimator.submit(Job(step, 1, Ledger(queues=queues), slot))
    estimator.stop(60)
    assert faults == []
    reader = RingReader(ring.fd)
    payloads = [record.payload for _ in range(2) if (record := reader.read())]
    first, second = (decode(payload).ledger for payload in payloads)
    # Every key of every KV head that a watched query head reads, once for all heads that share it.
    read_heads = len({head // (HEADS // KV_HEADS) for head in watched})
    assert first.key_bytes == sum(CONTEXTS) * read_heads * DIM * FLOAT32
    assert second.key_bytes == 2 * first.key_bytes
    # A record cannot hold its own length: it tells of those before.
    assert (first.record_bytes, second.record_bytes) == (0, len(payloads[0]))
    assert second.queues == queues
    reader.close()
    ring.close()
