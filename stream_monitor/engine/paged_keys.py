"""The engine's KV cache as the search reads it: layout read off the engine's writer, then checked on the real cache."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.layout import DeviceKeys, KeyLayout, PagedKeys, probe_permutation
from stream_kernels.search import BlockSummary, SearchConfig
from stream_monitor.engine.binding import Binding
from stream_monitor.engine.compat.layers import PagedLayerCache, cache_writer, learned_sinks, soft_cap

CHECK_TOLERANCE = 0.02
"""Largest difference of log-sum-exps in the self-check; bf16 keys and fp32 sums give about 1e-5."""
CHECK_TOKENS = 512
"""Keys of the self-check, as far as the cache has pages: enough that blocks are searched and not only forced."""


class LayoutError(ValueError):
    """The search would not read the engine's cache correctly."""


def paged_keys(caches: list[PagedLayerCache], layers: list[Any]) -> list[PagedKeys]:
    """The watched layers' keys; raises ValueError if the layout is not one the search knows."""
    layouts: dict[tuple[Any, ...], KeyLayout] = {}
    keys = []
    for cache, layer in zip(caches, layers, strict=True):
        _, kv_heads, page, width = cache.tensor.shape
        shape = (kv_heads, page, width // 2, cache.tensor.dtype)
        if shape not in layouts:
            layouts[shape] = _probe(layer, *shape)
        keys.append(
            PagedKeys(
                cache.tensor, layouts[shape], layer.impl.scale, cache.group, soft_cap(layer), learned_sinks(layer)
            )
        )
    return keys


def _probe(layer: Any, kv_heads: int, page: int, head_dim: int, dtype: torch.dtype) -> KeyLayout:
    scratch = torch.zeros((1, kv_heads, page, 2 * head_dim), dtype=dtype)
    store, slots = cache_writer(layer), torch.arange(page)

    def write(key: torch.Tensor) -> torch.Tensor:
        store(key, scratch, slots)
        return scratch[0, -1].flatten()[: page * head_dim]

    return KeyLayout.from_permutation(probe_permutation(write, page, head_dim, kv_heads, dtype))


def device_keys(caches: list[PagedLayerCache], layers: list[Any]) -> list[DeviceKeys]:
    """The watched layers' keys on a GPU, whatever the order of heads and tokens; raises ValueError as `DeviceKeys`."""
    return [
        DeviceKeys(
            cache.tensor.transpose(1, 2)[..., : cache.tensor.shape[3] // 2],
            layer.impl.scale,
            cache.group,
            soft_cap(layer),
            learned_sinks(layer),
        )
        for cache, layer in zip(caches, layers, strict=True)
    ]


@torch.inference_mode()
def check_against_dense(
    search_once: Callable[[torch.Tensor, list[NDArray[np.int32]], int], BlockSummary],
    keys: Sequence[PagedKeys | DeviceKeys],
    binding: Binding,
    config: SearchConfig,
) -> None:
    """Write known keys into the last pages of every watched layer's real cache through the engine's own writer, search
    them, and compare each row's total and each kept block's mass with dense attention. The pages are put back.

    Layers of different KV cache groups may share one tensor (v1/core/kv_cache_utils.py): each group gets other pages.

    Args:
        search_once: searches one row, given queries [L, 1, H_total, D] on the CPU, the block tables, int32 [1, pages],
            and the number of keys.

    Raises:
        LayoutError: any of them differs; capture must then stay off.
    """
    generator = torch.Generator().manual_seed(0)
    layers, caches = binding.layers, binding.caches
    layer_count, query_heads, head_dim = len(keys), layers[0].num_heads, layers[0].head_size
    queries = torch.randn((layer_count, 1, query_heads, head_dim), generator=generator).to(binding.dtype)
    groups = sorted({k.table for k in keys})
    pages_free = min(k.num_pages for k in keys) - 1  # page 0 is the engine's null block
    page = keys[0].layout.page_size
    pages = min(-(-min(CHECK_TOKENS, binding.max_context) // page), pages_free // len(groups))
    if pages < 1:
        raise LayoutError("the KV cache has no page to check the search on")
    context = min(pages * page - page // 3, binding.max_context)
    last = [k.num_pages - 1 - groups.index(k.table) * pages - np.arange(pages) for k in keys]
    tables = [np.zeros((1, pages), np.int32) for _ in range(1 + max(groups))]
    saved, written = [], []
    for k, layer, cache, ids in zip(keys, layers, caches, last, strict=True):
        tables[k.table][0] = ids
        saved.append(cache.tensor[ids.tolist()].clone())
        key = torch.randn((context, k.kv_heads, head_dim), generator=generator).to(cache.tensor.dtype)
        slots = torch.as_tensor(ids)[torch.arange(context) // page] * page + torch.arange(context) % page
        device = cache.tensor.device
        cache_writer(layer)(key.to(device), cache.tensor, slots.to(device))
        written.append(key)
    try:
        summary = search_once(queries, tables, context)
    finally:
        for cache, ids, content in zip(caches, last, saved, strict=True):
            cache.tensor[ids.tolist()] = content
    for index, (k, key) in enumerate(zip(keys, written, strict=True)):
        _compare(summary, index, queries[index, 0], key, k, binding.query_heads, config)


def _compare(
    summary: BlockSummary,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    known: PagedKeys | DeviceKeys,
    heads: Any,
    config: SearchConfig,
) -> None:
    group = query.shape[0] // key.shape[1]
    for slot, head in enumerate(heads):
        logits = known.scale * key[:, head // group].double() @ query[head].double()
        if known.softcap:
            logits = known.softcap * torch.tanh(logits / known.softcap)
        place = layer, 0, slot
        found = zip(summary.block_ids[place], summary.block_lse[place], summary.strongest[place], strict=True)
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
        total = float(summary.total_lse()[layer, 0, slot])
        bound = CHECK_TOLERANCE if config.strategy == "exact" else 1.0  # the unread remainder is an estimate
        if not abs(exact - total) <= bound:
            raise LayoutError(
                f"self-check failed: watched layer {layer}, head {head} has total log-sum-exp {total:.4f} by the "
                f"search and {exact:.4f} by dense attention"
            )
