"""Gathering and snapshotting query rows, with the kernels interpreted where there is no GPU."""

import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from stream_monitor.engine.compat.runner import BatchRows, DeviceInputs
from stream_monitor.engine.compat.schedule import ScheduledRequest, ScheduledStep
from stream_monitor.engine.gpu.rows import GatherTap, GpuSlot, RowBuffers
from stream_monitor.engine.gpu.streams import streams_of
from stream_monitor.engine.gpu.tables import HostTables
from stream_monitor.engine.prompt_rows import tokens_of
from stream_monitor.engine.requests import RowLabel
from stream_monitor.records import Phase

DEVICE = "cuda" if Path("/proc/driver/nvidia").exists() else "cpu"
LAYERS, REQUESTS, HEADS, DIM, PAGES, PAGE = 2, 5, 3, 16, 6, 16


def buffers(lengths: list[int], dtype: torch.dtype = torch.float16, decode_query_len: int = 1) -> RowBuffers:
    """For a batch whose requests have these many query tokens; the rest of query_start_loc is padded as vLLM pads."""
    starts = np.cumsum([0, *lengths, *[0] * (REQUESTS - len(lengths))])
    start_loc = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    return RowBuffers(LAYERS, REQUESTS, HEADS, DIM, dtype, start_loc, decode_query_len)


def queries(tokens: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """As a model has them: a part of the rows that one projection makes of queries, keys and values."""
    both = torch.randn(tokens, 5 * HEADS * DIM, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    return both[:, HEADS * DIM : 2 * HEADS * DIM].to(DEVICE).view(tokens, HEADS, DIM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_last_row_of_each_request_is_kept(dtype):
    batch = buffers([3, 1, 4], dtype)
    before = batch.rows.clone()
    query = queries(8, dtype)
    GatherTap(batch, 1).take(query)
    assert batch.faults == []
    assert torch.equal(batch.rows[1, :3], query[[2, 3, 7]])
    assert torch.equal(batch.rows[1, 3:], before[1, 3:]), "padding writes nothing"
    assert torch.equal(batch.rows[0], before[0])
    assert batch.passes.tolist() == [0, 1]


@pytest.mark.parametrize("prompt_stride", [0, 16])
def test_of_a_dummy_batch_with_the_lengths_of_the_one_before_nothing_is_read(prompt_stride):
    """What lies behind the query tensor's end is not ours to read; here it is, and is not copied."""
    start_loc = torch.tensor([0, 500, 600, 600, 600, 600], dtype=torch.int32, device=DEVICE)
    batch = RowBuffers(LAYERS, REQUESTS, HEADS, DIM, torch.float16, start_loc, prompt_stride=prompt_stride, tokens=600)
    GatherTap(batch, 1).take(queries(600)[:40])
    assert batch.faults == []
    assert (batch.rows[:, :REQUESTS] == 0).all()
    stretches = batch.rows[1, REQUESTS:].flatten(1).any(1).tolist()
    assert not any(stretches[3:]), "of the first 40 tokens, which are there, some may be a prompt's"
    assert batch.passes.tolist() == [0, 1]


def test_of_a_request_with_drafts_its_last_rows_are_kept():
    batch = buffers([3, 1, 4], decode_query_len=3)
    query = queries(8)
    GatherTap(batch, 1).take(query)
    assert torch.equal(batch.rows[1, :3], query[:3])
    assert (batch.rows[1, 3:5] == 0).all(), "a request has no rows but its own"
    assert torch.equal(batch.rows[1, 5:9], query[[3, 5, 6, 7]])
    assert batch.passes.tolist() == [0, 1]


@pytest.mark.parametrize("lengths", [[40, 1, 17], [1, 1, 1, 1, 90], [33], [5, 16, 16], [1100, 20]])
def test_rows_of_prompts_are_those_that_the_host_counts(lengths):
    starts = np.cumsum([0, *lengths, *[0] * (REQUESTS - len(lengths))])
    start_loc = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    total, padding = sum(lengths), 3
    batch = RowBuffers(LAYERS, REQUESTS, HEADS, DIM, torch.float16, start_loc, prompt_stride=16, tokens=total + padding)
    query = queries(total + padding)
    GatherTap(batch, 1).take(query)
    assert batch.faults == []
    wanted = torch.zeros_like(batch.rows[1, REQUESTS:])
    for token in tokens_of(starts.tolist(), 16):
        wanted[token // 16] = query[token]
    assert torch.equal(batch.rows[1, REQUESTS:], wanted)
    assert torch.equal(batch.rows[1, : len(lengths)], query[start_loc[1 : len(lengths) + 1].long() - 1])
    assert (batch.rows[0] == 0).all()


def test_a_row_of_a_prompt_has_its_own_length_and_pages():
    lengths = [40, 17]
    start_loc = torch.tensor([0, 40, 57, 57, 57, 57], dtype=torch.int32, device=DEVICE)
    batch = RowBuffers(LAYERS, REQUESTS, HEADS, DIM, torch.float16, start_loc, prompt_stride=16, tokens=64)
    query = queries(57)
    for layer in range(LAYERS):
        GatherTap(batch, layer).take(query)
    contexts = torch.tensor([60, 17, 0, 0, 0], dtype=torch.int32, device=DEVICE)  # of the first 20 were known
    table = torch.arange(REQUESTS * PAGES, dtype=torch.int32, device=DEVICE).view(REQUESTS, PAGES)
    tables = HostTables([1], [PAGES, PAGES])
    tables.follow(
        step(*(ScheduledRequest(i, 0, 1, 0, (), ([], table[n, :4].tolist()), True) for n, i in enumerate("ab")))
    )
    slot = slot_of(batch, DeviceInputs(contexts, [table * 0, table]), tables, deque())
    labels = [
        label("a", 27, after=32),
        label("a", 43, after=16),
        label("a", 59),
        label("b", 0, after=16),
        label("b", 16),
    ]
    assert slot.snapshot(BatchRows(["a", "b"], [], [], lengths), labels, 3) == ""
    assert torch.equal(slot.queries[:, :5], query[[7, 23, 39, 40, 56]].expand(LAYERS, -1, -1, -1))
    assert slot.seq_lens[:5].tolist() == [28, 44, 60, 1, 17]
    assert slot.block_tables[1, 1, :3].tolist() == [0, 1, 2]
    assert slot.block_tables[1, 3, :1].tolist() == [6]
    assert [len(pages) for pages in slot.pages[1]] == [2, 3, 4, 1, 2]


def test_a_graph_of_more_tokens_than_the_batch_gathers_the_batch():
    batch = buffers([1, 1])
    query = queries(4)  # padded to the graph's size
    GatherTap(batch, 0).take(query)
    assert torch.equal(batch.rows[0, :2], query[:2])
    assert (batch.rows[0, 2:] == 0).all()


def test_queries_of_another_shape_are_a_fault_and_no_exception():
    batch = buffers([1])
    GatherTap(batch, 0).take(queries(1).float())
    assert "query rows of watched layer 0 could not be gathered: queries are torch.float32" in batch.faults[0]


def request(request_id: str, blocks: list[int], fresh: bool = True) -> ScheduledRequest:
    return ScheduledRequest(request_id, 0, 1, 0, tuple(blocks), (blocks,), fresh)


def step(*requests: ScheduledRequest, finished: tuple[str, ...] = ()) -> ScheduledStep:
    return ScheduledStep((), frozenset(), requests, frozenset(finished), ())


def label(request_id: str, position: int, after: int = 0) -> RowLabel:
    return RowLabel(request_id, position, 0, Phase.DECODE, "", True, after=after)


def slot_of(batch: RowBuffers, inputs: DeviceInputs, tables: HostTables, reading: deque) -> GpuSlot:
    streams = streams_of(batch.rows.device)
    return GpuSlot(batch, inputs, tables, [1], [PAGE, PAGE], REQUESTS, streams, reading)


def test_a_snapshot_outlives_what_the_next_step_overwrites():
    batch = buffers([1, 1, 1])
    for layer in range(LAYERS):
        batch.rows[layer] = torch.randn(REQUESTS, HEADS, DIM).to(batch.rows)
        batch.passes[layer] = 7
    lengths = torch.tensor([40, 17, 5, 0, 0], dtype=torch.int32, device=DEVICE)
    table = torch.arange(REQUESTS * PAGES, dtype=torch.int32, device=DEVICE).view(REQUESTS, PAGES)
    inputs = DeviceInputs(lengths, [table * 0, table])
    tables = HostTables([1], [PAGES, PAGES])
    tables.follow(
        step(*(ScheduledRequest(i, 0, 1, 0, (), ([], table[n, :3].tolist()), True) for n, i in enumerate("abc")))
    )
    reading: deque[GpuSlot] = deque()
    slot = slot_of(batch, inputs, tables, reading)
    kept = batch.rows.clone()
    assert slot.snapshot(BatchRows(["a", "b", "c"], [], []), [label("b", 16), label("a", 39)], 3) == ""
    batch.rows.zero_(), lengths.zero_(), table.zero_()
    assert torch.equal(slot.queries[:, :2], kept[:, [1, 0]])
    assert slot.seq_lens[:2].tolist() == [17, 40]
    assert slot.block_tables[1, 0, :2].tolist() == [6, 7]
    assert slot.block_tables[1, 1, :3].tolist() == [0, 1, 2]
    assert slot.passes.tolist() == [7, 7]
    assert [pages.tolist() for pages in slot.pages[1]] == [[6, 7], [0, 1, 2]]
    assert (slot.generation, slot.launched, slot.finished) == (3, False, False)
    assert list(reading) == [slot]


def test_of_drafts_the_accepted_rows_stay_each_with_its_own_length():
    batch = buffers([3, 1], decode_query_len=3)
    for layer in range(LAYERS):
        batch.rows[layer] = torch.randn(3 * REQUESTS, HEADS, DIM).to(batch.rows)
    lengths = torch.tensor([40, 17, 0, 0, 0], dtype=torch.int32, device=DEVICE)
    table = torch.arange(REQUESTS * PAGES, dtype=torch.int32, device=DEVICE).view(REQUESTS, PAGES)
    tables = HostTables([1], [PAGES, PAGES])
    tables.follow(
        step(*(ScheduledRequest(i, 0, 1, 0, (), ([], table[n, :3].tolist()), True) for n, i in enumerate("ab")))
    )
    slot = slot_of(batch, DeviceInputs(lengths, [table * 0, table]), tables, deque())
    labels = [label("a", 37, after=2), label("a", 38, after=1), label("a", 39), label("b", 16)]
    assert slot.snapshot(BatchRows(["a", "b"], [], []), labels, 3) == ""
    assert slot.seq_lens[:4].tolist() == [38, 39, 40, 17]
    slot.keep([0, 1, 3])  # the second draft was rejected
    assert slot.labels == [labels[0], labels[1], labels[3]]
    assert slot.seq_lens[:3].tolist() == [38, 39, 17]
    assert torch.equal(slot.queries[:, :3], batch.rows[:, [0, 1, 5]])
    assert slot.block_tables[1, 2, :2].tolist() == [6, 7]
    assert [len(pages) for pages in slot.pages[1]] == [3, 3, 2]
    assert not slot.finished
    slot.keep([])
    assert slot.finished, "no search will read it"


def test_a_fault_of_a_tap_is_told_by_the_snapshot():
    batch = buffers([1])
    batch.faults.append("broken")
    inputs = DeviceInputs(torch.zeros(5, dtype=torch.int32), [torch.zeros(5, 6, dtype=torch.int32)] * 2)
    slot = slot_of(batch, inputs, HostTables([1], [6, 6]), deque())
    assert slot.snapshot(BatchRows(["a"], [], []), [label("a", 0)], 1) == "broken"


def test_host_tables_follow_requests_and_keep_what_rows_refer_to():
    tables = HostTables([0], [4])
    tables.follow(step(request("a", [5, 6])))
    first = tables.pages("a", 0, 2)
    tables.follow(step(request("a", [7], fresh=False)))
    assert tables.pages("a", 0, 3).tolist() == [5, 6, 7]
    tables.follow(step(request("a", [9, 8])))  # preempted, and back
    assert tables.pages("a", 0, 2).tolist() == [9, 8]
    assert first.tolist() == [5, 6]
    with pytest.raises(ValueError, match="holds 2 pages of group 0, and its row needs 3"):
        tables.pages("a", 0, 3)
    tables.follow(step(finished=("a",)))
    with pytest.raises(KeyError):
        tables.pages("a", 0, 1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile_for_a_real_gpu(capability):
    """To machine code, which Triton can do where there is none."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.rows_compile", capability],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert set(kernels) == {"gather_rows_kernel", "gather_prompt_rows_kernel", "snapshot_kernel"}
    assert all(size > 0 for size in kernels.values())
