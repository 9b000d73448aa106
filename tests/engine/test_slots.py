"""What the taps keep of a forward pass: the last query rows of each request, whichever way they are copied."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stream_monitor.engine.compat.runner import BatchRows
from stream_monitor.engine.cpu.slots import CpuSlot, LayerTap
from stream_monitor.engine.requests import RowLabel
from stream_monitor.records import Phase

HEADS, DIM = 2, 4


@pytest.mark.parametrize("tokens", [[1, 1, 1], [1], [3, 1, 2], [1, 5]])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("decode_query_len", [1, 2])
def test_the_last_rows_of_each_request_are_kept(tokens: list[int], padding: int, decode_query_len: int) -> None:
    taps = [LayerTap(0), LayerTap(1)]
    slot = CpuSlot(taps, 4 * decode_query_len, HEADS, DIM, [1], torch.float32, decode_query_len)
    slot.open()
    start_loc = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = start_loc[1:].tolist()
    for layer, tap in enumerate(taps):
        # A part of a wider projection, as models hand it over.
        query = torch.randn(sum(tokens) + padding, HEADS, 3 * DIM)[..., :DIM]
        tap.take(query, start_loc)
        assert not tap.fault
        last = [range(end - min(decode_query_len, own), end) for end, own in zip(ends, tokens, strict=True)]
        for request, rows in enumerate(last):
            end = (request + 1) * decode_query_len
            assert torch.equal(slot.queries[layer, end - len(rows) : end], query[list(rows)])
    assert slot.taken.tolist() == [decode_query_len * len(tokens)] * 2


@pytest.mark.parametrize("tokens", [[1, 50, 1], [17], [16, 16], [15, 17], [1] * 14 + [17], [5, 40, 33]])
@pytest.mark.parametrize("decode_query_len", [1, 18])
def test_rows_of_prompts_are_kept_each_at_its_place(tokens: list[int], decode_query_len: int) -> None:
    names = [f"r{number}" for number in range(len(tokens))]
    tap = LayerTap(0)
    room = decode_query_len * len(tokens) + 8
    slot = CpuSlot([tap], room, HEADS, DIM, [1], torch.float32, decode_query_len, prompt_stride=16)
    slot.open()
    start_loc = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    query = torch.randn(sum(tokens), HEADS, DIM)
    tap.take(query, start_loc)
    assert not tap.fault
    labels = [
        RowLabel(name, count - 1 - after, 0, Phase.PREFILL_CHUNK, "", True, after=after)
        for name, count in zip(names, tokens, strict=True)
        for after in range((count - 1) // 16 * 16, -1, -16)
    ]
    table = np.ones((len(tokens), 1), np.int32)
    assert slot.snapshot(BatchRows(names, [table], [64], tokens), labels, 1) == ""
    starts = dict(zip(names, start_loc.tolist(), strict=False))
    wanted = [starts[label.request_id] + label.position for label in labels]
    assert torch.equal(slot.queries[0, slot.batch_rows[: len(labels)]], query[wanted])
    assert slot.contexts[: len(labels)].tolist() == [label.position + 1 for label in labels]


def test_a_layer_that_left_other_rows_of_prompts_is_a_fault() -> None:
    tap = LayerTap(0)
    slot = CpuSlot([tap], 8, HEADS, DIM, [1], torch.float32, prompt_stride=16)
    slot.open()
    tap.take(torch.randn(40, HEADS, DIM), torch.tensor([0, 40], dtype=torch.int32))
    batch = BatchRows(["a"], [np.ones((1, 1), np.int32)], [64], [17])
    assert slot.snapshot(batch, [], 1) == "watched layer 0 left 4 query rows where the batch has 3"


PINNED = """
import os, sys, threading
import torch
from stream_monitor.engine.cpu.slots import CpuSlot, LayerTap

cpus = sorted(os.sched_getaffinity(0))
a = torch.randn(2000, 2000)
(a * a).sum()  # the engine's own team of threads
slot = CpuSlot([LayerTap(0)], 256, 32, 128, [16], torch.bfloat16)
slot.queries.normal_()
slot.labels, slot.batch_rows[:3] = [None] * 3, (7, 2, 200)

def search():
    os.sched_setaffinity(0, {cpus[-1]})
    found = slot.sampled_queries()
    assert os.sched_getaffinity(0) == {cpus[-1]}, os.sched_getaffinity(0)
    sys.stdout.write(str(found.dtype))
    gathered.append(found)

gathered = []
thread = threading.Thread(target=search)
thread.start()
thread.join()
assert torch.equal(gathered[0], slot.queries[:, [7, 2, 200]])
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a second CPU")
def test_the_estimator_thread_stays_on_its_cpu() -> None:
    """Where the engine binds OpenMP's threads, whoever begins a parallel region is bound with them."""
    first = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", PINNED],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": str(first)},
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "torch.bfloat16"), done.stderr[-2000:]
