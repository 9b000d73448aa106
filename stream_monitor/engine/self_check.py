"""The self-check at start, on the engine's real KV cache: what the search finds is compared with dense attention.

Known keys of invented requests are written into the cache's last pages through the engine's own writer, and put back.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.cpu import ROW_OK
from stream_kernels.layout import DeviceKeys, PagedKeys
from stream_kernels.search import BlockSummary, SearchConfig
from stream_monitor.engine.binding import Binding
from stream_monitor.engine.compat.layers import cache_writer
from stream_monitor.engine.compat.runner import BatchRows
from stream_monitor.engine.device import RowSearch, StepSlot
from stream_monitor.engine.requests import RowLabel
from stream_monitor.records import Phase

Keys = Sequence[PagedKeys | DeviceKeys]

CHECK_TOLERANCE = 0.02
"""Largest difference of log-sum-exps in the self-check; bf16 keys and fp32 sums give about 1e-5."""
CHECK_TOKENS = 512
"""Keys of the self-check, as far as the cache has pages: enough that blocks are searched and not only forced."""


class LayoutError(ValueError):
    """The search would not read the engine's cache correctly."""


@dataclass(frozen=True)
class Planted:
    """An invented request whose keys are in the cache.

    Attributes:
        pages: of its block table, by KV cache group, int32 [pages]; empty for a group without watched layers.
        context: keys it has.
        keys: per watched layer, [context, kv_heads, head_dim].
    """

    pages: list[NDArray[np.int32]]
    context: int
    keys: list[torch.Tensor]


@contextlib.contextmanager
def planted(keys: Keys, binding: Binding, requests: int) -> Iterator[list[Planted]]:
    """Requests of random keys in pages of their own, the second a little shorter than the first, and so on.

    Layers of different KV cache groups may share one tensor (v1/core/kv_cache_utils.py): each group gets other pages.

    Raises:
        LayoutError: the cache has too few pages.
    """
    generator = torch.Generator().manual_seed(0)
    groups = sorted({k.table for k in keys})
    pages_free = min(k.num_pages for k in keys) - 1  # page 0 is the engine's null block
    page = keys[0].layout.page_size
    pages = min(-(-min(CHECK_TOKENS, binding.max_context) // page), pages_free // (len(groups) * requests))
    if pages < 1:
        raise LayoutError("the KV cache has no page to check the search on")
    saved: list[tuple[torch.Tensor, list[int], torch.Tensor]] = []
    made = []
    try:
        for request in range(requests):
            context = max(1, min(pages * page - page // 3, binding.max_context) - 5 * request)
            own = Planted([np.zeros(0, np.int32) for _ in range(1 + max(groups))], context, [])
            for k, layer, cache in zip(keys, binding.layers, binding.caches, strict=True):
                first = k.num_pages - 1 - (groups.index(k.table) * requests + request) * pages
                ids = (first - np.arange(pages)).astype(np.int32)
                own.pages[k.table] = ids
                saved.append((cache.tensor, ids.tolist(), cache.tensor[ids.tolist()].clone()))
                # Numbers that the cache holds, in the type the model computes in.
                key = torch.randn((context, k.kv_heads, layer.head_size), generator=generator)
                key = key.to(k.tensor.dtype).to(binding.dtype)
                slots = torch.as_tensor(ids)[torch.arange(context) // page] * page + torch.arange(context) % page
                device = cache.tensor.device
                cache_writer(layer)(key.to(device), cache.tensor, slots.long().to(device))
                own.keys.append(key)
            made.append(own)
        yield made
    finally:
        # Backwards, so that a page that was written twice gets its first content.
        for tensor, pages_written, content in reversed(saved):
            tensor[pages_written] = content


@torch.inference_mode()
def check_against_dense(
    search_once: Callable[[torch.Tensor, list[NDArray[np.int32]], int], BlockSummary],
    keys: Keys,
    binding: Binding,
    config: SearchConfig,
) -> None:
    """Search one planted request, and compare each row's total and each kept block's mass with dense attention.

    Args:
        search_once: searches one row, given queries [L, 1, H_total, D] on the CPU, the block tables, int32 [1, pages],
            and the number of keys.

    Raises:
        LayoutError: any of them differs; capture must then stay off.
    """
    queries = _queries(binding, 1)
    with planted(keys, binding, 1) as (request,):
        width = max(len(pages) for pages in request.pages)
        tables = [pages[None] if len(pages) else np.zeros((1, width), np.int32) for pages in request.pages]
        summary = search_once(queries, tables, request.context)
    for index, known in enumerate(keys):
        _compare(summary, (index, 0), queries[index, 0], request.keys[index], known, binding.query_heads, config)


@torch.inference_mode()
def check_ownership(slot: StepSlot, search: RowSearch, keys: Keys, binding: Binding, config: SearchConfig) -> None:
    """The canary: two planted requests go the way of a step, from the taps over the slot to the search, and each must
    come back with what dense attention says of its own query and keys.

    Their rows are sampled in another order than the batch's, and the first has query tokens before its last.

    Raises:
        LayoutError: a row is another request's, or of no request.
    """
    queries = _queries(binding, 4)
    starts = torch.tensor([0, 3, 4], dtype=torch.int32)
    names, last_rows = ["canary-0", "canary-1"], [2, 3]
    with planted(keys, binding, 2) as requests:
        slot.open()
        for index, layer in enumerate(binding.layers):
            layer.impl.stream_tap.take(queries[index], starts)
        labels = [
            RowLabel(name, request.context - 1, 0, Phase.DECODE, "", True)
            for name, request in reversed(list(zip(names, requests, strict=True)))
        ]
        fault = slot.snapshot(_batch(names, requests, binding), labels, binding.generations.now)
        if fault:
            raise LayoutError(f"ownership check failed: {fault}")
        status = search.run(slot)
    if list(status[:2]) != [ROW_OK, ROW_OK]:
        raise LayoutError(f"ownership check failed: the search says {list(status[:2])} of two rows that nobody touched")
    for row, label in enumerate(slot.labels):
        place = names.index(label.request_id)
        for index, known in enumerate(keys):
            query, key = queries[index, last_rows[place]], requests[place].keys[index]
            try:
                _compare(search.summary, (index, row), query, key, known, binding.query_heads, config)
            except LayoutError as error:
                raise LayoutError(f"ownership check failed, row of request {place} among two: {error}") from None


def _batch(names: list[str], requests: list[Planted], binding: Binding) -> BatchRows:
    """The batch as a runner would tell of it."""
    tables = []
    for group, width in enumerate(binding.runner.table_pages()):
        table = np.zeros((len(requests), width), np.int32)
        for row, request in enumerate(requests):
            own = request.pages[group] if group < len(request.pages) else np.zeros(0, np.int32)
            table[row, : len(own)] = own
        tables.append(table)
    return BatchRows(names, tables, binding.runner.block_tokens())


def _queries(binding: Binding, rows: int) -> torch.Tensor:
    """Numbers that a tap may be shown, [L, rows, H_total, D]."""
    layers = binding.layers
    shape = (len(layers), rows, layers[0].num_heads, layers[0].head_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(binding.query_dtype).to(binding.dtype)


def _compare(
    summary: BlockSummary,
    place: tuple[int, int],
    query: torch.Tensor,
    key: torch.Tensor,
    known: PagedKeys | DeviceKeys,
    heads: Sequence[int],
    config: SearchConfig,
) -> None:
    """Hold the result at `place`, a watched layer and a row, against dense attention of `query` over `key`."""
    layer, row = place
    group = query.shape[0] // key.shape[1]
    for slot, head in enumerate(heads):
        logits = known.scale * key[:, head // group].double() @ query[head].double()
        if known.softcap:
            logits = known.softcap * torch.tanh(logits / known.softcap)
        at = layer, row, slot
        found = zip(summary.block_ids[at], summary.block_lse[at], summary.strongest[at], strict=True)
        for block, lse, strongest in found:
            if block < 0:
                continue
            of_block = logits[block * config.block_size : (block + 1) * config.block_size]
            if not of_block[strongest] >= of_block.max() - CHECK_TOLERANCE:
                raise LayoutError(
                    f"self-check failed: the strongest key of block {block} of watched layer {layer}, head {head} is "
                    f"at {int(of_block.argmax())} by dense attention and at {strongest} by the search"
                )
            exact = torch.logsumexp(of_block, 0).item()
            if not abs(exact - float(lse)) <= CHECK_TOLERANCE:
                raise LayoutError(
                    f"self-check failed: block {block} of watched layer {layer}, head {head} has log-sum-exp {lse:.4f} "
                    f"by the search and {exact:.4f} by dense attention"
                )
        sink = logits[:0] if known.sinks is None else known.sinks[head, None].double().cpu()
        exact = torch.logsumexp(torch.cat([logits, sink]), 0).item()
        total = float(summary.total_lse()[at])
        bound = CHECK_TOLERANCE if config.strategy == "exact" else 1.0  # the unread remainder is an estimate
        if not abs(exact - total) <= bound:
            raise LayoutError(
                f"self-check failed: watched layer {layer}, head {head} has total log-sum-exp {total:.4f} by the "
                f"search and {exact:.4f} by dense attention"
            )
