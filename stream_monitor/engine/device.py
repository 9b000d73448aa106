"""What differs between CPU and GPU, and the contract between the two threads of the capture.

Labelling, policy, requests, ledgers, block generations, packing and the ring are the same everywhere. A device brings:

* taps that keep the query rows of watched layers during the forward pass (`backends/`);
* slots. The runner thread opens one before a forward pass and snapshots into it after; from then on it belongs to the
  estimator thread, until that releases it. No slot free means that the step's rows are dropped: nobody waits.
* a search. The estimator thread calls `run` with a slot; it returns when the results are on the host. A row comes back
  as `ROW_RACED` if one of its blocks may have been rewritten before the search had read it, and is thrown away.

The contract on rewritten blocks: the runner thread raises a block's generation (`BlockGenerations`) before the step
that may rewrite it is enqueued or run. On a CPU the search compares generations after its last read. On a GPU it does
so once, when it is enqueued; from then on the runner thread makes the device wait before such a step (`follow`).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stream_kernels.search import BlockSummary
from stream_monitor.engine.compat.runner import BatchRows
from stream_monitor.engine.compat.schedule import ScheduledStep
from stream_monitor.engine.requests import RowLabel
from stream_monitor.records import Audit


class StepSlot(Protocol):
    """Room for the sampled rows of one step."""

    labels: list[RowLabel]
    """The sampled rows, in the order of the search's results."""

    def open(self) -> None:
        """A forward pass follows whose rows go into this slot."""

    def snapshot(self, batch: BatchRows, labels: list[RowLabel], generation: int) -> str:
        """Copy the rows of `labels` and what locates their keys, before the runner's buffers change. Returns why that
        is impossible, empty if it is done."""

    def keep(self, rows: list[int]) -> None:
        """Of the snapshotted rows only these, ascending, are wanted: the others' draft tokens were rejected. Called
        once the tokens are known, before the next step; with no rows the slot is free again."""


class RowSearch(Protocol):
    """The search over a slot's rows; used by the estimator thread alone."""

    summary_bytes: int
    """Memory of block summaries."""

    summary: BlockSummary
    """Results of the last `run`, rows in the order of its labels; until the next one."""

    def run(self, slot: Any) -> NDArray[np.uint8]:
        """Search every row of a slot in every watched layer and head; the status of each row, uint8 [R]."""

    def audit(self, slot: Any, layer: int, row: int, head: int) -> Audit | None:
        """Judge one row, layer and head of the last `run` by exact attention; None if its keys may be gone."""

    def set_logit_weights(self, scales: list[float], sinks: list[Any]) -> None:
        """Factors from product to logit and learned sinks may have changed, one entry per watched layer. Not while a
        search runs."""


class Device(Protocol):
    """The capture's hardware side in one worker."""

    @property
    def slots(self) -> Sequence[StepSlot]: ...

    @property
    def search(self) -> RowSearch: ...

    waits: int
    """Steps that the device held back until a search had read a block that they were to rewrite."""

    def follow(self, step: ScheduledStep) -> None:
        """Before each step, on the runner thread, after its blocks got their generation."""

    def take_tap_ns(self) -> int:
        """Nanoseconds that the taps took of the forward passes since the last call."""

    def stop(self) -> None:
        """Capture is off for good: the taps keep nothing from here on."""


def places(
    labels: Sequence[RowLabel],
    rows: Sequence[int],
    query_tokens: Sequence[int],
    per_request: int,
    first: int,
    stride: int,
) -> list[int]:
    """Where the query row of each label is kept: the last `per_request` rows of each request in batch order, and from
    place `first` on rows of prompts, by the stretch of `stride` query tokens that they lie in.

    Args:
        rows: batch row of each label's request.
        query_tokens: of each request of the batch; needed for rows of prompts alone.
    """
    ends = list(accumulate(query_tokens))
    return [
        (row + 1) * per_request - 1 - label.after
        if label.after < per_request
        else first + (ends[row] - 1 - label.after) // stride
        for label, row in zip(labels, rows, strict=True)
    ]
