"""Buffers of one captured step: filled on the runner thread, read by the estimator thread, then used again."""

import time

import numpy as np
import torch

from stream_monitor.engine.compat.runner import BatchRows
from stream_monitor.engine.requests import RowLabel


class CpuSlot:
    """Query rows and KV addresses of one step.

    Args:
        taps: of the watched layers, in plan order.
        rows: most requests in a batch (`max_num_seqs`).
        query_heads, head_dim: of a layer on this rank.
        pages: most pages of a request, per KV cache group.
        dtype: of the model's queries.
    """

    def __init__(
        self, taps: list["LayerTap"], rows: int, query_heads: int, head_dim: int, pages: list[int], dtype: torch.dtype
    ) -> None:
        self._taps = taps
        self.queries = torch.zeros((len(taps), rows, query_heads, head_dim), dtype=dtype)
        """[L, rows, H, D]; the batch's rows in batch order."""
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
        for tap in self._taps:
            tap.slot = self

    def snapshot(self, batch: BatchRows, labels: list[RowLabel], generation: int) -> str:
        """Check that every watched layer left exactly the batch's rows, then copy the tables of the sampled ones."""
        for layer, tap in enumerate(self._taps):
            tap.slot = None
            if tap.fault:
                return tap.fault
            if self.taken[layer] != len(batch.request_ids):
                return (
                    f"watched layer {layer} left {self.taken[layer]} query rows where the batch has "
                    f"{len(batch.request_ids)}"
                )
        row_of = {request_id: row for row, request_id in enumerate(batch.request_ids)}
        self.labels = labels
        for n, label in enumerate(labels):
            row = row_of[label.request_id]
            self.batch_rows[n] = row
            self.contexts[n] = label.position + 1
            for group, table in enumerate(batch.block_tables):
                pages = -(-(label.position + 1) // batch.page_tokens[group])
                self.tables[group][n, :pages] = table[row, :pages]
        self.generations[: len(labels)] = generation
        return ""


class LayerTap:
    """Copies the query rows of one watched layer into the open slot (see backends/tap.py)."""

    def __init__(self, layer: int) -> None:
        self.slot: CpuSlot | None = None
        self.fault: str = ""
        self.ns = 0
        """Time spent copying, since somebody set this to 0."""
        self._layer = layer

    def take(self, query: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """Keep the last row of each request; does nothing in a step without sampled rows."""
        slot = self.slot
        if slot is None:
            return
        begin = time.perf_counter_ns()
        try:
            rows = query_start_loc.shape[0] - 1
            torch.index_select(query, 0, query_start_loc[1:] - 1, out=slot.queries[self._layer, :rows])
            slot.taken[self._layer] = rows
        except Exception as error:  # must not reach the engine; the capture reads `fault` after the forward pass
            self.slot, self.fault = None, f"query rows of watched layer {self._layer} could not be copied: {error}"
        self.ns += time.perf_counter_ns() - begin
