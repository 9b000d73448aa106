"""A worker as the index of summaries knows it: caches, block tables, the real capture and the real search.

A scheduler, real or modelled, says what each step does. The key of a token is a function of the layer and of the tokens
up to it, so that what any page must hold, and what any summary must say, can be made again from scratch.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.cpu import ROW_OK, ROW_RACED, CpuSearch
from stream_kernels.cpu_kernel.nodes import NodeIndex, resolve
from stream_kernels.cpu_kernel.summaries import mean_address, outlier_offset
from stream_kernels.index import allocate_index, levels_for
from stream_kernels.layout import KeyLayout, PagedKeys
from stream_kernels.search import BlockSummary, SearchConfig
from stream_kernels.statistics import FANOUT, pyramid
from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.capture import Capture
from stream_monitor.engine.compat.runner_v1 import RunnerV1
from stream_monitor.engine.compat.schedule import ScheduledStep
from stream_monitor.engine.cpu.slots import CpuSlot
from stream_monitor.engine.governor import Governor
from stream_monitor.engine.requests import RequestTable
from stream_monitor.engine.steps import Job

ROWS = 8
LAYERS_PER_GROUP, HEAD_DIM = 2, 8
PREFIXES = 1 << 15
"""Prefixes are told apart by a number below this; the few that share one have the same key, which does no harm."""
RELATIVE, ABSOLUTE = 2.0**-7, 1e-3
"""Float32 and float64 may round a statistic to neighbouring bfloat16, and so may the children it is made of."""


@dataclass(frozen=True)
class Shape:
    """What differs from engine to engine.

    `groups` KV-cache groups share the page ids and the tensors; the layers of those in `watched` are searched.
    """

    page_size: int
    block_size: int
    groups: int = 1
    watched: tuple[int, ...] = (0,)
    token_group: int = 1
    channel_pack: int = 1
    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 1
    sink_blocks: int = 1
    connector: bool = False
    small_index: bool = False
    """Room for the nodes of one row alone, so that every row evicts those of the others."""

    @property
    def max_context(self) -> int:
        """Enough for the pyramid to have three levels, which starts at 128 inner blocks."""
        return 131 * self.block_size

    @property
    def pages(self) -> int:
        """Room for two of the longest requests, and the null page."""
        return 1 + self.groups * -(-220 * self.block_size // self.page_size)

    @property
    def layers(self) -> int:
        return self.groups * LAYERS_PER_GROUP


@dataclass(frozen=True)
class SearchedRow:
    """A row of a step, what it attends to and what the search said of it."""

    request_id: str
    generation: int
    pages: list[NDArray[np.int32]]
    """Of each watched group."""
    status: int
    intact: bool
    """Whether its pages still hold its keys."""


@dataclass(frozen=True)
class _Step:
    """A step that waits to be searched."""

    slot: CpuSlot
    ids: list[NDArray[np.int64]]
    """Prefixes of each row."""
    of_block: NDArray[np.int64]
    """The generations then."""


@numba.njit(error_model="numpy")
def _resolve(index, pages, end, generations, snapshot, slots, jobs):
    """`resolve` for Python, which cannot call what only compiled code calls."""
    index.searches[0] += 1
    return resolve(index, pages, end, generations, snapshot, slots, jobs)


class Worker:
    """Runs steps and searches them later, in order, as the estimator thread would.

    `prefix_keys` is the key of each prefix, float32 [PREFIXES, layers, kv_heads, HEAD_DIM].
    """

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        rng = torch.Generator().manual_seed(seed)
        self._prefix_keys = torch.randn(PREFIXES, shape.layers, shape.kv_heads, HEAD_DIM, generator=rng).to(shape.dtype)
        layout = KeyLayout(shape.page_size, HEAD_DIM, shape.token_group, shape.channel_pack)
        self._offsets = torch.from_numpy(layout.offsets())
        # The layers of a group each have a tensor; those of the other groups overlay it.
        self._tiles = [
            torch.full((shape.pages, shape.kv_heads, 2 * shape.page_size * HEAD_DIM), torch.nan, dtype=shape.dtype)
            for _ in range(LAYERS_PER_GROUP)
        ]
        caches = [tile.view(shape.pages, shape.kv_heads, shape.page_size, 2 * HEAD_DIM) for tile in self._tiles]
        self.config = SearchConfig(
            strategy="beam",
            block_size=shape.block_size,
            top_k=1,
            width=2,
            sink_blocks=shape.sink_blocks,
            recent_blocks=1,
            probe_keys=1,
            box_width=1,
            outlier_keys=2,
        )
        self._search = CpuSearch(
            [PagedKeys(cache, layout, 0.3, group) for group in shape.watched for cache in caches],
            2 * shape.kv_heads,
            self.config,
            max_rows=ROWS,
            max_context=shape.max_context,
            query_dtype=torch.float32,
        )
        levels = levels_for(self.config, shape.max_context)
        assert levels.count == 3
        if shape.small_index:
            nodes = allocate_index(self.config, levels, shape.page_size, 1, shape.max_context)
            nodes = nodes._replace(entry_of=np.full((levels.count, shape.pages), -1, np.int32))
            self._search._beam = self._search._beam._replace(nodes=nodes)
        self._summary = BlockSummary.allocate(self._search.layers, ROWS, 2 * shape.kv_heads, self.config)

        most_pages = -(-shape.max_context // shape.page_size)
        self._batch = SimpleNamespace(
            req_ids=[],
            block_table=SimpleNamespace(
                block_tables=[
                    SimpleNamespace(
                        block_table=SimpleNamespace(np=np.zeros((ROWS, most_pages), np.int32)),
                        block_size=shape.page_size,
                    )
                    for _ in range(shape.groups)
                ]
            ),
        )
        self.generations = BlockGenerations(shape.pages)
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=shape.page_size))
        runner = SimpleNamespace(
            input_batch=self._batch, kv_cache_config=SimpleNamespace(kv_cache_groups=[group] * shape.groups)
        )
        self.slots = [
            CpuSlot([], ROWS, 2 * shape.kv_heads, HEAD_DIM, [most_pages] * shape.groups, torch.float32)
            for _ in range(4)
        ]
        self._capture = Capture(
            RunnerV1(runner),
            shape.connector,
            self,  # type: ignore[arg-type]
            RequestTable(1, 64, False, None, None, False),
            self.generations,
            1,
            Governor(0),
        )
        self._capture.arm(self)  # type: ignore[arg-type]
        self.tables: dict[str, list[list[int]]] = {}
        """Pages of every request the worker knows, per group."""
        self._ids: Mapping[str, NDArray[np.int64]] = {}
        self._waiting: deque[_Step] = deque()
        self.compared: Counter[int] = Counter()
        """Summaries compared so far, by level."""

    # What the capture sees of the device and of the estimator thread.
    backlog, shares_cpus, processor_seconds, waits = 0, False, 0.0, 0

    def step_begun(self) -> None:
        """Nothing waits for it."""

    def follow(self, step: ScheduledStep) -> None:
        """Generations say all."""

    def take_tap_ns(self) -> int:
        return 0

    def submit(self, job: Job) -> None:
        if job.slot is not None:
            rows = range(len(job.slot.labels))
            ids = [self._ids[job.slot.labels[row].request_id] for row in rows]
            self._waiting.append(_Step(job.slot, ids, self.generations.of_block.copy()))

    def drain(self, timeout: float) -> bool:
        return True

    def execute(
        self,
        output: Any,
        ids: Mapping[str, NDArray[np.int64]],
        accepted: Mapping[str, int] | None = None,
        loads: Sequence[tuple[str, int, int]] = (),
    ) -> None:
        """Runs a step.

        Args:
            output: the scheduler's, real or alike.
            ids: for each scheduled request the prefix of every token whose key is in the cache after the step.
            accepted: keys that each request's row attends to, where drafts behind them were rejected.
            loads: (request, first, end) of tokens that a connector loads.
        """
        before = {data.req_id: data.num_computed_tokens for data in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._capture.before_step(output)
        self._follow(output)
        for page in output.new_block_ids_to_zero or ():
            for tile in self._tiles:
                tile[page] = 0
        for copy in output.kv_cache_block_copies or ():
            for tile in self._tiles:
                tile[copy.dst_block_id] = tile[copy.src_block_id]
        for request_id, first, end in loads:
            self._write(request_id, ids[request_id], first, end)
        for request_id, tokens in output.num_scheduled_tokens.items():
            self._write(request_id, ids[request_id], before[request_id], before[request_id] + tokens)

        self._batch.req_ids = list(output.num_scheduled_tokens)
        for row, request_id in enumerate(self._batch.req_ids):
            for group, table in enumerate(self._batch.block_table.block_tables):
                pages = self.tables[request_id][group]
                table.block_table.np[row, : len(pages)] = pages
        self._ids = ids
        waiting = len(self._waiting)
        self._capture.after_forward(sampling_follows=False)
        assert not self._capture.fault
        if len(self._waiting) > waiting and accepted:
            slot = self._waiting[-1].slot
            for row, label in enumerate(slot.labels):
                slot.contexts[row] = accepted.get(label.request_id, slot.contexts[row])
        # The runner's tables are used again in the next step: nothing may depend on them.
        for table in self._batch.block_table.block_tables:
            table.block_table.np[:] = -1

    def invalidate(self) -> None:
        """The cache loses its content, as in sleep and wake-up."""
        self._capture.invalidate()
        for tile in self._tiles:
            tile.fill_(3.0)

    def give_away(self, page: int) -> None:
        """A page gets another owner, who writes to it at once."""
        self.generations.next_step()
        self.generations.mark([page])
        for tile in self._tiles:
            tile[page] = 3.0

    def search_next_while(self, meanwhile: Callable[[], None]) -> None:
        """Searches the step that waits longest, and calls `meanwhile` on another thread as soon as it is settled what
        to build for the first row. Which comes first then, the end or the change, is left open."""
        step = self._waiting.popleft()
        searches, before = self._search._beam.nodes.searches, int(self._search._beam.nodes.searches[0])

        def watch() -> None:
            while searches[0] == before:
                pass
            meanwhile()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        self._run(step, self.generations.of_block)
        thread.join()
        self._capture.release(step.slot)

    def search_next(self, overtaken: bool = False) -> list[SearchedRow]:
        """Searches the step that waits longest, and checks every summary that its rows may use from now on.

        `overtaken`: search before as if the steps since then had not marked a page yet, but had written to it. That
        the summaries made then are of no use, the generations alone must tell.
        """
        if not self._waiting:
            return []
        step = self._waiting.popleft()
        slot, ids = step.slot, step.ids
        rows = len(slot.labels)
        contexts, generations = slot.contexts[:rows], slot.generations[:rows]
        if overtaken:
            self._run(step, step.of_block)
        status = self._run(step, self.generations.of_block)
        found = []
        for row in range(rows):
            context = int(contexts[row])
            used = -(-context // self.shape.page_size)
            pages = [slot.tables[group][row, :used].copy() for group in range(self.shape.groups)]
            intact = self._holds(pages, ids[row][:context])
            if status[row] == ROW_OK:
                assert intact, "a row whose keys were overwritten was taken for good"
                self.check_summaries(pages, ids[row][:context], int(generations[row]))
            else:
                assert status[row] == ROW_RACED
            found.append(
                SearchedRow(
                    slot.labels[row].request_id,
                    int(generations[row]),
                    [pages[group] for group in self.shape.watched],
                    int(status[row]),
                    intact,
                )
            )
        self._capture.release(slot)
        return found

    def _run(self, step: _Step, of_block: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Status of each row of a step."""
        slot, rows = step.slot, len(step.slot.labels)
        return self._search.run(
            torch.ones(self._search.layers, rows, 2 * self.shape.kv_heads, HEAD_DIM),
            [table[:rows] for table in slot.tables],
            slot.contexts[:rows],
            self._summary,
            of_block,
            slot.generations[:rows],
        )

    def check_summaries(self, pages: Sequence[NDArray[np.int32]], ids: NDArray[np.int64], snapshot: int) -> None:
        """Compares every summary that counts as valid for a row of these pages and prefixes with one from scratch."""
        end = -(-len(ids) // self.config.block_size) - self.config.recent_blocks
        if end <= 0:
            return
        beam = self._search._beam
        levels = len(beam.nodes.hand)
        for at, group in enumerate(self.shape.watched):
            # On a copy, for what is listed to be built would count as built.
            index = NodeIndex(*(part.copy() if isinstance(part, np.ndarray) else part for part in beam.nodes))
            slots, jobs = np.full_like(beam.scratch.slots, -1), np.zeros_like(beam.scratch.jobs)
            count = _resolve(index, pages[group], end, self.generations.of_block, snapshot, slots, jobs)
            assert count >= 0
            slots[index.row_offset[jobs[:count, 0]] + jobs[:count, 2]] = -1
            if (slots < 0).all():
                continue

            logical = self._prefix_keys[ids[: end * self.config.block_size]]
            logical = logical[:, group * LAYERS_PER_GROUP : (group + 1) * LAYERS_PER_GROUP].double()
            blocks = logical.flatten(1, 2).transpose(0, 1).unflatten(1, (end, self.config.block_size))
            expected = pyramid(blocks, levels, self.config.sink_blocks, self.config.outlier_keys)
            for level in range(levels):
                first = index.row_offset[level]
                of_nodes = slots[first : first + end // FANOUT**level]
                valid = np.flatnonzero(of_nodes >= 0)
                found = self._stored(at * LAYERS_PER_GROUP, of_nodes[valid])
                nodes = expected[level]
                wanted = torch.cat([nodes.mean, nodes.outliers.flatten(2), nodes.spread[..., None]], dim=-1)
                wanted = wanted.unflatten(0, (LAYERS_PER_GROUP, -1))[:, :, valid]
                right = (found - wanted).abs() <= RELATIVE * wanted.abs() + ABSOLUTE
                assert right.all(), f"level {level}, nodes {sorted(set(valid[(~right).nonzero()[:, 2]]))}"
                self.compared[level] += right.numel() // wanted.shape[-1]

    def _stored(self, first_layer: int, slots: NDArray[np.int32]) -> torch.Tensor:
        """Mean, outliers and spread in `slots` [n], float64 [LAYERS_PER_GROUP, kv_heads, n, (1 + O) * HEAD_DIM + 1]."""
        beam = self._search._beam
        layers, kv_heads = np.ogrid[first_layer : first_layer + LAYERS_PER_GROUP, : self.shape.kv_heads]
        places = self._search._geometry, beam.summaries, layers[..., None], slots.astype(np.int64), kv_heads[..., None]
        means = mean_address.py_func(*places)
        numbers = beam.statistics.reshape(-1, HEAD_DIM)
        parts = np.arange(1 + self.config.outlier_keys) * outlier_offset.py_func(*places[:2])
        at = (means[..., None] + parts - numbers.ctypes.data) // (2 * HEAD_DIM)
        vectors = torch.from_numpy(numbers.view(np.int16)[at]).view(torch.bfloat16).double().flatten(-2)
        spreads = torch.from_numpy(beam.summaries.spreads[layers[..., None], kv_heads[..., None], slots]).double()
        return torch.cat([vectors, spreads[..., None]], dim=-1)

    def _follow(self, output: Any) -> None:
        """Block tables, as a model runner keeps them."""
        for request_id in output.finished_req_ids:
            self.tables.pop(request_id, None)
        for data in output.scheduled_new_reqs:
            self.tables[data.req_id] = [list(pages) for pages in data.block_ids]
        cached = output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self.tables[request_id] = [list(pages) for pages in block_ids]
            elif block_ids is not None:
                for own, pages in zip(self.tables[request_id], block_ids, strict=True):
                    own.extend(pages)

    def _places(self, pages: NDArray[np.int32], positions: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """Indices [n, kv_heads, HEAD_DIM] of the keys at `positions` in a tensor of tiles."""
        page = torch.from_numpy(pages[positions // self.shape.page_size].astype(np.int64))
        within = torch.from_numpy(positions % self.shape.page_size)
        heads = torch.arange(self.shape.kv_heads)
        return page[:, None, None], heads[None, :, None], self._offsets[within][:, None, :]

    def _write(self, request_id: str, ids: NDArray[np.int64], first: int, end: int) -> None:
        """The forward pass, or a connector, stores the keys of tokens `first` to `end` in every group's layers."""
        for group in range(self.shape.groups):
            pages = np.array(self.tables[request_id][group], np.int32)
            places = self._places(pages, np.arange(first, end))
            for i, tile in enumerate(self._tiles):
                tile[places] = self._prefix_keys[ids[first:end], group * LAYERS_PER_GROUP + i]

    def _holds(self, pages: Sequence[NDArray[np.int32]], ids: NDArray[np.int64]) -> bool:
        """Whether the pages of the watched groups hold the keys of these prefixes."""
        for group in self.shape.watched:
            places = self._places(pages[group], np.arange(len(ids)))
            for i, tile in enumerate(self._tiles):
                if not torch.equal(tile[places], self._prefix_keys[ids, group * LAYERS_PER_GROUP + i]):
                    return False
        return True
