"""Inputs for the GPU search as an engine holds them, and the search run on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from stream_kernels.gpu import DeviceSummary, GpuSearch
from stream_kernels.layout import DeviceKeys
from stream_kernels.reference import search
from stream_kernels.search import BlockSummary
from stream_kernels.statistics import FANOUT

from .cases import Case, Inputs, draw

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"

if DEVICE == "cpu":
    # The interpreter prepares Triton's library anew at every call of every function in a kernel, which takes most of
    # its time. Where that has been done already there is nothing left to do.
    prepare = interpreter._patch_lang

    def prepare_once(function: Callable[..., object]) -> object:
        libraries = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(library.arange) for library in libraries):
            return prepare(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = prepare_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

CacheForm = Literal["pages, tokens, heads", "keys and values, pages, tokens", "pages, keys and values, heads, tokens"]


@dataclass(frozen=True)
class GpuCase(Case):
    """`key_dtype` is the cache's element type, `dtype` that of the numbers drawn; `form` orders the cache's axes."""

    form: CacheForm = "pages, tokens, heads"
    key_dtype: torch.dtype | None = None
    max_programs: int | None = 3
    padding_rows: int = 1


@dataclass(frozen=True)
class GpuInputs:
    queries: torch.Tensor
    keys: list[DeviceKeys]
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    rows: torch.Tensor


def stored(logical: torch.Tensor, form: CacheForm) -> torch.Tensor:
    """Keys [pages, page, heads, channels] as a view of a cache of that form; its values are NaN."""
    if form == "pages, tokens, heads":
        return logical.contiguous()
    values = torch.full_like(logical.float(), torch.nan).to(logical.dtype)
    if form == "keys and values, pages, tokens":
        cache = _stack(logical, values, 0)
        return cache[0]
    cache = _stack(logical.transpose(1, 2), values.transpose(1, 2), 1)
    return cache[:, 0].transpose(1, 2)


def _stack(keys: torch.Tensor, values: torch.Tensor, axis: int) -> torch.Tensor:
    as_bytes = [part.contiguous().view(torch.uint8) for part in (keys, values)]
    return torch.stack(as_bytes, axis).view(keys.dtype)


def on_device(case: GpuCase, inputs: Inputs) -> GpuInputs:
    """The same rows, with one more at the end that does not count."""
    keys = []
    for layer in inputs.keys:
        every = torch.arange(layer.num_pages)
        logical = layer.gather(every).unflatten(0, (-1, layer.layout.page_size)).to(case.key_dtype or case.dtype)
        sinks = None if layer.sinks is None else layer.sinks.to(DEVICE)
        keys.append(DeviceKeys(stored(logical.to(DEVICE), case.form), layer.scale, layer.table, layer.softcap, sinks))
    widest = max(table.shape[1] for table in inputs.block_tables)
    rows = len(case.contexts) + case.padding_rows
    tables = torch.full((len(inputs.block_tables), rows, widest), -7, dtype=torch.int32)
    for index, table in enumerate(inputs.block_tables):
        tables[index, : len(table), : table.shape[1]] = table
    queries = torch.full((case.layers, rows, *inputs.queries.shape[2:]), torch.nan, dtype=inputs.queries.dtype)
    queries[:, : len(case.contexts)] = inputs.queries
    lens = torch.full((rows,), 10**6, dtype=torch.int32)
    lens[: len(case.contexts)] = torch.from_numpy(inputs.context_lens)
    count = torch.tensor([len(case.contexts)], dtype=torch.int32)
    return GpuInputs(*(t.to(DEVICE) for t in (queries,)), keys, tables.to(DEVICE), lens.to(DEVICE), count.to(DEVICE))


def level_offsets(case: GpuCase) -> list[int]:
    """Where levels start in a row of node slots, with room for every whole node of the longest context."""
    blocks = max(case.contexts) // case.config.block_size
    nodes = [blocks // FANOUT**level for level in range(6)]
    return [sum(nodes[:level]) for level in range(len(nodes) + 1)]


def number_nodes(case: GpuCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of all nodes that the rows' searches may use, numbered one after the other, -1 for the others; and the jobs
    that build them, in a shuffled order."""
    offsets = level_offsets(case)
    slots = torch.full((len(case.contexts) + case.padding_rows, offsets[-1]), -1, dtype=torch.int32)
    jobs: list[list[int]] = []
    for row, context in enumerate(case.contexts):
        end = max(0, -(-context // case.config.block_size) - case.config.recent_blocks)
        for level in range(len(offsets) - 1):
            for node in range(end // FANOUT**level):
                slots[row, offsets[level] + node] = len(jobs)
                jobs.append([level, len(jobs), row, node])
    order = torch.randperm(len(jobs), generator=torch.Generator().manual_seed(case.seed))
    return slots, torch.tensor(jobs, dtype=torch.int32).reshape(-1, 4)[order]


def build(case: GpuCase, inputs: GpuInputs) -> tuple[GpuSearch, torch.Tensor | None]:
    """A search for `case`, with its summaries built, and the slots of its nodes."""
    slots, jobs = number_nodes(case)
    beam = case.config.strategy == "beam"
    searcher = GpuSearch(
        inputs.keys,
        case.total_heads,
        case.config,
        max_rows=len(case.contexts) + case.padding_rows,
        max_context=max(case.contexts),
        query_dtype=inputs.queries.dtype,
        query_heads=case.query_heads,
        summary_slots=max(1, len(jobs)) if beam else 0,
        level_offsets=level_offsets(case) if beam else (),
        max_programs=case.max_programs,
    )
    if not beam:
        return searcher, None
    count = torch.tensor([len(jobs)], dtype=torch.int32, device=DEVICE)
    spare = torch.full((3, 4), 10**6, dtype=torch.int32)  # beyond the count
    listed = torch.cat([jobs, spare]).to(DEVICE)
    searcher.update(listed, count, inputs.block_tables, slots.to(DEVICE))
    return searcher, slots.to(DEVICE)


def run_gpu(case: GpuCase, inputs: GpuInputs) -> tuple[BlockSummary, DeviceSummary]:
    searcher, slots = build(case, inputs)
    out = searcher.allocate_result()
    out.storage.fill_(0x5A)
    searcher.run(inputs.queries, inputs.block_tables, inputs.context_lens, inputs.rows, out, slots)
    return out.on_host().first_rows(len(case.contexts)), out


def run_reference(case: GpuCase, inputs: GpuInputs) -> BlockSummary:
    rows = len(case.contexts)
    keys = [
        replace(layer, tensor=layer.tensor.cpu(), sinks=None if layer.sinks is None else layer.sinks.cpu())
        for layer in inputs.keys
    ]
    return search(
        inputs.queries[:, :rows].cpu(),
        keys,
        list(inputs.block_tables[:, :rows].cpu()),
        inputs.context_lens[:rows].cpu(),
        case.config,
        case.query_heads,
    )


def same_inputs(case: GpuCase) -> GpuInputs:
    return on_device(case, draw(case))
