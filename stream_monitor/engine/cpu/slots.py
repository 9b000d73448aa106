"""Buffers of one captured step: filled on the runner thread, read by the estimator thread, then used again."""

import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stream_monitor.engine.compat.runner import BatchRows
from stream_monitor.engine.device import places
from stream_monitor.engine.prompt_rows import taken_from, tokens_of
from stream_monitor.engine.requests import RowLabel


class CpuSlot:
    """Query rows and KV addresses of one step.

    Args:
        taps: of the watched layers, in plan order.
        rows: most query rows kept of a batch: `decode_query_len` of each request.
        query_heads, head_dim: of a layer on this rank.
        pages: most pages of a request, per KV cache group.
        dtype: of the model's queries.
        decode_query_len: most query rows of a decoding request: 1, and 1 more for each draft token.
        prompt_stride: see `prompt_rows`; 0: no rows of prompts but the last of each chunk.
    """

    def __init__(
        self,
        taps: list["LayerTap"],
        rows: int,
        query_heads: int,
        head_dim: int,
        pages: list[int],
        dtype: torch.dtype,
        decode_query_len: int = 1,
        prompt_stride: int = 0,
    ) -> None:
        self._taps = taps
        self._per_request = decode_query_len
        self._prompt_stride = prompt_stride
        self.one_row_each = decode_query_len == 1
        """Whether, where requests only decode, all query rows are kept, as they stand."""
        self._last = torch.arange(-decode_query_len, 0, dtype=torch.int32)
        self._start_loc: torch.Tensor | None = None
        self._index = torch.zeros(0, dtype=torch.int32)
        self._targets: list[torch.Tensor] = []
        self.queries = torch.zeros((len(taps), rows, query_heads, head_dim), dtype=dtype)
        """[L, rows, H, D]; the last `decode_query_len` rows of each request, in batch order, then rows of prompts."""
        self._bits = self.queries.view({2: torch.int16, 4: torch.int32}[dtype.itemsize]).numpy()
        self.tables = [np.zeros((rows, width), np.int32) for width in pages]
        """Per group, pages of each sampled row, int32 [rows, pages]."""
        self.taken = np.zeros(len(taps), np.int32)
        """Rows each watched layer left in `queries` this step."""
        self.batch_rows = np.zeros(rows, np.int64)
        """Batch row of each sampled row."""
        self.contexts = np.zeros(rows, np.int32)
        """Keys each sampled row attends to."""
        self.generations = np.zeros(rows, np.int64)
        """Step in which each sampled row was taken."""
        self.labels: list[RowLabel] = []

    def open(self) -> None:
        """Point the taps here."""
        self.taken[:] = 0
        self._start_loc = None
        for tap in self._taps:
            tap.slot = self

    def aim(self, query_start_loc: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The batch's query rows to copy, and where to in each watched layer; worked out once a step, since it costs as
        much as the copy of a layer. Of a request with fewer rows than are taken those of others come along, which no
        label points to."""
        if query_start_loc is not self._start_loc:
            self._start_loc = query_start_loc
            self._index = (query_start_loc[1:, None] + self._last).view(-1).clamp_(min=0)
            if self._prompt_stride:
                self._index = torch.cat([self._index, self._prompt_index(query_start_loc.tolist())])
            rows = len(self._index)
            if not self._targets or len(self._targets[0]) != rows:
                self._targets = [layer[:rows] for layer in self.queries]
        return self._index, self._targets

    def _prompt_index(self, starts: list[int]) -> torch.Tensor:
        """The query rows of prompts, each at its place; at the others any."""
        lengths = [end - begin for begin, end in pairwise(starts)]
        index = torch.zeros(taken_from(lengths, self._prompt_stride), dtype=torch.int32)
        for token in tokens_of(starts, self._prompt_stride):
            index[token // self._prompt_stride] = token
        return index

    def snapshot(self, batch: BatchRows, labels: list[RowLabel], generation: int) -> str:
        """Check that every watched layer left exactly the batch's rows, then copy the tables of the sampled ones."""
        first = len(batch.request_ids) * self._per_request
        expected = first + taken_from(batch.query_tokens, self._prompt_stride)
        for layer, tap in enumerate(self._taps):
            tap.slot = None
            if tap.fault:
                return tap.fault
            if self.taken[layer] != expected:
                return f"watched layer {layer} left {self.taken[layer]} query rows where the batch has {expected}"
        row_of = {request_id: row for row, request_id in enumerate(batch.request_ids)}
        rows = [row_of[label.request_id] for label in labels]
        self.labels = labels
        self.batch_rows[: len(labels)] = places(
            labels, rows, batch.query_tokens, self._per_request, first, self._prompt_stride
        )
        for n, (label, row) in enumerate(zip(labels, rows, strict=True)):
            self.contexts[n] = label.position + 1
            for group, table in enumerate(batch.block_tables):
                pages = -(-(label.position + 1) // batch.page_tokens[group])
                self.tables[group][n, :pages] = table[row, :pages]
        self.generations[: len(labels)] = generation
        return ""

    def sampled_queries(self) -> torch.Tensor:
        """[L, R, H, D], of the sampled rows.

        Gathered by numpy: on the estimator thread torch would begin a team of OpenMP threads, whose runtime binds them,
        and the thread itself, to the engine's cores (GOMP_CPU_AFFINITY, utils/ompmultiprocessing.py).
        """
        bits = self._bits.take(self.batch_rows[: len(self.labels)], axis=1)
        return torch.from_numpy(bits).view(self.queries.dtype)

    def keep(self, rows: list[int]) -> None:
        """See `StepSlot`."""
        self.labels = [self.labels[row] for row in rows]
        arrays: list[NDArray[Any]] = [self.batch_rows, self.contexts, self.generations, *self.tables]
        for array in arrays:
            array[: len(rows)] = array[rows]


class LayerTap:
    """Copies the query rows of one watched layer into the open slot (see backends/tap.py)."""

    def __init__(self, layer: int) -> None:
        self.slot: CpuSlot | None = None
        self.fault: str = ""
        self.ns = 0
        """Time spent copying, since somebody set this to 0."""
        self._layer = layer

    def take(self, query: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """Keep the last rows of each request; does nothing in a step without sampled rows."""
        slot = self.slot
        if slot is None:
            return
        begin = time.perf_counter_ns()
        try:
            index, targets = slot.aim(query_start_loc)
            if slot.one_row_each and len(query) == len(query_start_loc) - 1 == len(index):
                targets[self._layer].copy_(query)  # in half the time
            else:
                torch.index_select(query, 0, index, out=targets[self._layer])
            slot.taken[self._layer] = len(index)
        except Exception as error:  # must not reach the engine; the capture reads `fault` after the forward pass
            self.slot, self.fault = None, f"query rows of watched layer {self._layer} could not be copied: {error}"
        self.ns += time.perf_counter_ns() - begin
