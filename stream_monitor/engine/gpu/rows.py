"""Query rows on the GPU: where the forward pass leaves them, and the slots they are snapshotted into."""

from collections import deque

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from stream_monitor.engine.compat.runner import BatchRows, DeviceInputs
from stream_monitor.engine.device import places
from stream_monitor.engine.gpu.kernels import gather_prompt_rows_kernel, gather_rows_kernel, snapshot_kernel
from stream_monitor.engine.gpu.streams import Streams
from stream_monitor.engine.gpu.tables import HostTables, Pages
from stream_monitor.engine.prompt_rows import MOST_OF_CHUNK, room
from stream_monitor.engine.requests import RowLabel

_CHUNK = 1024
"""Elements that a program copies at a time."""


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that one kernel copies every type."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


class RowBuffers:
    """Persistent memory for the last query rows of each request, in batch order, in every watched layer.

    Allocated when the model is loaded, so that the engine's memory profile sees it and CUDA graphs may hold its
    addresses. A graph's replay fills it without any Python; `passes` is how a snapshot knows.

    Args:
        layers: watched layers.
        requests: most requests of a batch.
        query_start_loc: the runner's own, int32 [requests + 1].
        decode_query_len: rows of a request that are kept: 1, and 1 more for each draft token.
        prompt_stride, tokens: see `prompt_rows`, and most query tokens of a batch; rows of prompts come after the rest.
    """

    def __init__(
        self,
        layers: int,
        requests: int,
        query_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        query_start_loc: torch.Tensor,
        decode_query_len: int = 1,
        prompt_stride: int = 0,
        tokens: int = 0,
    ) -> None:
        device = query_start_loc.device
        self.per_request = decode_query_len
        self.prompt_stride = prompt_stride
        self.first_of_prompts = requests * decode_query_len
        shape = (layers, self.first_of_prompts + room(tokens, prompt_stride), query_heads, head_dim)
        self.rows = torch.zeros(shape, dtype=dtype, device=device)
        self.passes = torch.zeros(layers, dtype=torch.int32, device=device)
        """Forward passes that each layer has seen."""
        self.query_start_loc = query_start_loc
        self.faults: list[str] = []
        """What went wrong in a tap; the capture ends at the next snapshot."""


class GatherTap:
    """Gathers one layer's rows (see backends/tap.py); inside a CUDA graph capture its launch becomes a node."""

    def __init__(self, buffers: RowBuffers, layer: int) -> None:
        self._buffers = buffers
        self._rows = as_bits(buffers.rows[layer])
        self._prompt_rows = self._rows[buffers.first_of_prompts :]
        self._passes = buffers.passes[layer : layer + 1]
        self._dtype = buffers.rows.dtype
        self._layer = layer

    def take(self, query: torch.Tensor, query_start_loc: torch.Tensor | None = None) -> None:
        """Launch the kernel for as many requests as there may be among these tokens; neither waits nor allocates."""
        try:
            _, heads, dim = self._rows.shape
            if query.dtype != self._dtype or query.stride()[1:] != (dim, 1) or query.shape[1:] != (heads, dim):
                raise ValueError(f"queries are {query.dtype} {list(query.shape)} with strides {query.stride()}")
            if not len(query):
                return
            buffers, chunks = self._buffers, triton.cdiv(heads * dim, _CHUNK)
            # Each request has a token at least.
            last_rows = min(buffers.first_of_prompts, query.shape[0] * buffers.per_request)
            gather_rows_kernel[last_rows, chunks](
                as_bits(query),
                query.stride(0),
                query.shape[0],
                buffers.query_start_loc,
                self._rows,
                self._passes,
                heads * dim,
                PER_REQUEST=buffers.per_request,
                CHUNK=_CHUNK,
            )
            if buffers.prompt_stride and query.shape[0] > buffers.prompt_stride:
                requests = len(buffers.query_start_loc) - 1
                gather_prompt_rows_kernel[room(query.shape[0], buffers.prompt_stride), chunks](
                    as_bits(query),
                    query.stride(0),
                    query.shape[0],
                    buffers.query_start_loc,
                    requests,
                    self._prompt_rows,
                    heads * dim,
                    STRIDE=buffers.prompt_stride,
                    MOST=MOST_OF_CHUNK,
                    REQUESTS=triton.next_power_of_2(requests),
                    CHUNK=_CHUNK,
                )
        except Exception as error:  # must not reach the engine
            self._buffers.faults.append(f"query rows of watched layer {self._layer} could not be gathered: {error}")


class GpuSlot:
    """The snapshot of one step's sampled rows, in device memory.

    Args:
        buffers: what is snapshotted.
        inputs: the runner's lengths and block tables, snapshotted too, since the next step overwrites them.
        tables: the host's copy of the block tables.
        groups: KV cache groups of the watched layers; the search's tables are in the engine's numbering.
        page_tokens: tokens per page, per KV cache group.
        max_rows: most sampled rows of a step.
        reading: slots that were snapshotted into, oldest first; the runner thread's.
    """

    def __init__(
        self,
        buffers: RowBuffers,
        inputs: DeviceInputs,
        tables: HostTables,
        groups: list[int],
        page_tokens: list[int],
        max_rows: int,
        streams: Streams,
        reading: "deque[GpuSlot]",
    ) -> None:
        self._reading = reading
        self._buffers, self._inputs, self._tables = buffers, inputs, tables
        self._groups, self._page_tokens = groups, page_tokens
        device, layers = buffers.rows.device, buffers.rows.shape[0]
        pinned = device.type == "cuda"
        self.queries = torch.zeros((layers, max_rows, *buffers.rows.shape[2:]), dtype=buffers.rows.dtype, device=device)
        """[L, R, H, D]"""
        widest = max(inputs.block_tables[group].shape[1] for group in groups)
        self.block_tables = torch.zeros((1 + max(groups), max_rows, widest), dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        """Lengths as the device had them: the truth about where a row stands."""
        self.passes = torch.zeros(layers, dtype=torch.int32, device=device)
        self._from = torch.zeros(3, max_rows, dtype=torch.int32, device=device)
        """Of each sampled row its place in the buffers, its request's in the batch, and the request's rows after it."""
        self._staged = torch.zeros(3, max_rows, dtype=torch.int32, pin_memory=pinned)
        self.ready, self.done = streams.event(), streams.event()
        """Recorded after the snapshot, on the engine's stream; after the search, on the side stream."""
        self.launched = False
        """Set by the estimator thread once `done` is recorded: from then on a device can be made to wait for it."""
        self.finished = True
        """Set by the estimator thread once the search has read all it needs."""
        self.labels: list[RowLabel] = []
        self.pages: dict[int, list[Pages]] = {}
        """Per group, the host's pages of each row."""
        self.generation = 0

    def open(self) -> None:
        """Nothing to point anywhere: every forward pass fills the row buffers."""

    def snapshot(self, batch: BatchRows, labels: list[RowLabel], generation: int) -> str:
        """Enqueue the copies on the engine's stream; see `StepSlot`."""
        if self._buffers.faults:
            return self._buffers.faults[0]
        row_of = {request_id: row for row, request_id in enumerate(batch.request_ids)}
        rows = [row_of[label.request_id] for label in labels]
        buffers, staged = self._buffers, self._staged.numpy()
        staged[:, : len(labels)] = (
            places(
                labels, rows, batch.query_tokens, buffers.per_request, buffers.first_of_prompts, buffers.prompt_stride
            ),
            rows,
            [label.after for label in labels],
        )
        self._from.copy_(self._staged, non_blocking=True)
        self.pages = {
            group: [
                self._tables.pages(label.request_id, group, -(-(label.position + 1) // self._page_tokens[group]))
                for label in labels
            ]
            for group in self._groups
        }
        self._copy_rows(len(labels))
        self.passes.copy_(self._buffers.passes)
        self.launched = self.finished = False
        self.labels, self.generation = labels, generation
        self.ready.record()
        self._reading.append(self)
        return ""

    def keep(self, rows: list[int]) -> None:
        """Enqueue the move of the kept rows to the front; see `StepSlot`."""
        self.labels = [self.labels[row] for row in rows]
        self.pages = {group: [pages[row] for row in rows] for group, pages in self.pages.items()}
        self.finished = not rows
        # Pinned memory of its own: the copy of the snapshot may not have been read yet.
        wanted = torch.tensor(rows, dtype=torch.int64, pin_memory=self._staged.is_pinned())
        index = wanted.to(self.queries.device, non_blocking=True)
        self.queries[:, : len(rows)] = self.queries[:, index]
        self.block_tables[:, : len(rows)] = self.block_tables[:, index]
        self.seq_lens[: len(rows)] = self.seq_lens[index]
        self.ready.record()

    def _copy_rows(self, rows: int) -> None:
        source, target = as_bits(self._buffers.rows), as_bits(self.queries)
        width = source.shape[2] * source.shape[3]
        for number, group in enumerate(self._groups):
            layers = 0 if number else len(source)
            table, slot_table = self._inputs.block_tables[group], self.block_tables[group]
            snapshot_kernel[(rows, layers + 1)](
                self._from,
                self._from.stride(0),
                source,
                source.stride(0),
                target,
                target.stride(0),
                width,
                layers,
                self._inputs.seq_lens,
                self.seq_lens,
                table,
                table.stride(0),
                slot_table,
                slot_table.stride(0),
                self._page_tokens[group],
                CHUNK=_CHUNK,
            )

    def place(self, queries: torch.Tensor, tables: list[NDArray[np.int32]], context: int) -> None:
        """Fill the slot with one row by hand, for the self-check: queries [L, 1, H, D], tables int32 [1, pages].

        Copies a row as a snapshot does, too, so that those kernels are compiled before any step needs them.
        """
        self._copy_rows(1)
        self.queries[:, :1] = queries.to(self.queries.device)
        for group in self._groups:
            pages = torch.from_numpy(tables[group][0])
            self.block_tables[group, 0, : len(pages)] = pages.to(self.block_tables.device)
        self.seq_lens[:1] = context
        self.pages = {group: [tables[group][0]] for group in self._groups}
        self.launched = False
        self.ready.record()
