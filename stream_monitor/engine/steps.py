"""Buffers of one captured step: filled on the runner thread, read by the estimator thread, then used again."""

from dataclasses import dataclass, field

import numpy as np
import torch

from stream_monitor.engine.compat import BatchRows
from stream_monitor.engine.requests import RowLabel
from stream_monitor.records import Ledger, RequestFinished, RequestStarted, TokenRun


class StepSlot:
    """Query rows and KV addresses of one step.

    Args:
        layers: watched layers.
        rows: most requests in a batch (`max_num_seqs`).
        query_heads, head_dim: of a layer on this rank.
        pages: most pages of a request, per KV cache group.
        dtype: of the model's queries.
    """

    def __init__(
        self, layers: int, rows: int, query_heads: int, head_dim: int, pages: list[int], dtype: torch.dtype
    ) -> None:
        self.queries = torch.zeros((layers, rows, query_heads, head_dim), dtype=dtype)
        """[L, rows, H, D]; the batch's rows in batch order."""
        self.tables = [np.zeros((rows, width), np.int32) for width in pages]
        """Per group, pages of each sampled row, int32 [rows, pages]."""
        self.taken = np.zeros(layers, np.int32)
        """Rows each watched layer left in `queries` this step."""
        self.batch_rows = np.zeros(rows, np.int64)
        """Batch row of each sampled row."""
        self.contexts = np.zeros(rows, np.int32)
        """Keys each sampled row attends to."""
        self.generations = np.zeros(rows, np.int64)
        """Step in which each sampled row was taken."""
        self.labels: list[RowLabel] = []
        """The sampled rows."""

    def snapshot(self, batch: BatchRows, labels: list[RowLabel], generation: int) -> None:
        """Copy what the estimator needs to find the sampled rows' keys; the runner reuses its tables next step."""
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


class LayerTap:
    """Copies the query rows of one watched layer into the current slot (see backends/tap.py)."""

    def __init__(self, layer: int) -> None:
        self.slot: StepSlot | None = None
        self.fault: str = ""
        self._layer = layer

    def take(self, query: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """Keep the last row of each request; does nothing in a step without sampled rows."""
        slot = self.slot
        if slot is None:
            return
        try:
            rows = query_start_loc.shape[0] - 1
            torch.index_select(query, 0, query_start_loc[1:] - 1, out=slot.queries[self._layer, :rows])
            slot.taken[self._layer] = rows
        except Exception as error:  # must not reach the engine; the capture reads `fault` after the forward pass
            self.slot, self.fault = None, f"query rows of watched layer {self._layer} could not be copied: {error}"


@dataclass
class Job:
    """What the estimator thread works on: a step's lifecycle entries, and its rows if any were sampled."""

    step: int
    wall_time_ns: int
    ledger: Ledger
    slot: StepSlot | None = None
    started: list[RequestStarted] = field(default_factory=list)
    tokens: list[TokenRun] = field(default_factory=list)
    finished: list[RequestFinished] = field(default_factory=list)
