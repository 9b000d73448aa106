"""The engine's KV cache as the search reads it: layout read off the engine's writer, then checked on the real cache."""

from typing import Any

import numpy as np
import torch

from stream_kernels.cpu import CpuSearch
from stream_kernels.layout import KeyLayout, PagedKeys, probe_permutation
from stream_kernels.search import BlockSummary, SearchConfig
from stream_monitor.engine.compat import PagedLayerCache, cpu_cache_writer, learned_sinks, soft_cap

CHECK_TOLERANCE = 0.02
"""Largest difference of log-sum-exps in the self-check; bf16 keys and fp32 sums give about 1e-5."""
MAX_CHECK_PAGES = 4


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
    store, slots = cpu_cache_writer(layer), torch.arange(page)

    def write(key: torch.Tensor) -> torch.Tensor:
        store(key, scratch, slots)
        return scratch[0, -1].flatten()[: page * head_dim]

    return KeyLayout.from_permutation(probe_permutation(write, page, head_dim, kv_heads, dtype))


def check_against_dense(
    search: CpuSearch, keys: list[PagedKeys], layers: list[Any], caches: list[PagedLayerCache], config: SearchConfig
) -> None:
    """Write known keys into the last pages of every watched layer's real cache through the engine's own writer, search
    them, and compare each row's total and each kept block's mass with dense attention. The pages are put back.

    Layers of different KV cache groups may share one tensor (v1/core/kv_cache_utils.py): each group gets other pages.

    Raises:
        LayoutError: any of them differs; capture must then stay off.
    """
    generator = torch.Generator().manual_seed(0)
    layer_count, query_heads, head_dim = len(keys), layers[0].num_heads, layers[0].head_size
    queries = torch.randn((layer_count, 1, query_heads, head_dim), generator=generator).to(keys[0].tensor.dtype)
    groups = sorted({k.table for k in keys})
    pages_free = min(k.num_pages for k in keys) - 1  # page 0 is the engine's null block
    pages = min(MAX_CHECK_PAGES, pages_free // len(groups))
    if pages < 1:
        raise LayoutError("the KV cache has no page to check the search on")
    page = keys[0].layout.page_size
    context = pages * page - page // 3
    last = [k.num_pages - 1 - groups.index(k.table) * pages - np.arange(pages) for k in keys]
    tables = [np.zeros((1, pages), np.int32) for _ in range(1 + max(groups))]
    saved, written = [], []
    for k, layer, cache, ids in zip(keys, layers, caches, last, strict=True):
        tables[k.table][0] = ids
        saved.append(cache.tensor[ids.tolist()].clone())
        key = torch.randn((context, k.kv_heads, head_dim), generator=generator).to(cache.tensor.dtype)
        slots = torch.as_tensor(ids)[torch.arange(context) // page] * page + torch.arange(context) % page
        cpu_cache_writer(layer)(key, cache.tensor, slots)
        written.append(key)
    try:
        summary = BlockSummary.allocate(layer_count, 1, len(search.query_heads), config)
        search.run(queries, tables, np.asarray([context], np.int32), summary)
    finally:
        for cache, ids, content in zip(caches, last, saved, strict=True):
            cache.tensor[ids.tolist()] = content
    for index, (k, key) in enumerate(zip(keys, written, strict=True)):
        _compare(summary, index, queries[index, 0], key, k, search.query_heads, config)


def _compare(
    summary: BlockSummary,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    known: PagedKeys,
    heads: Any,
    config: SearchConfig,
) -> None:
    group = query.shape[0] // key.shape[1]
    for slot, head in enumerate(heads):
        logits = known.scale * key[:, head // group].double() @ query[head].double()
        if known.softcap:
            logits = known.softcap * torch.tanh(logits / known.softcap)
        for block, lse in zip(summary.block_ids[layer, 0, slot], summary.block_lse[layer, 0, slot], strict=True):
            if block < 0:
                continue
            exact = torch.logsumexp(logits[block * config.block_size : (block + 1) * config.block_size], 0).item()
            if not abs(exact - float(lse)) <= CHECK_TOLERANCE:
                raise LayoutError(
                    f"self-check failed: block {block} of watched layer {layer}, head {head} has log-sum-exp {lse:.4f} "
                    f"by the search and {exact:.4f} by dense attention"
                )
        sink = logits[:0] if known.sinks is None else known.sinks[head, None].double()
        exact = torch.logsumexp(torch.cat([logits, sink]), 0).item()
        total = float(summary.total_lse()[layer, 0, slot])
        bound = CHECK_TOLERANCE if config.strategy == "exact" else 1.0  # the unread remainder is an estimate
        if not abs(exact - total) <= bound:
            raise LayoutError(
                f"self-check failed: watched layer {layer}, head {head} has total log-sum-exp {total:.4f} by the "
                f"search and {exact:.4f} by dense attention"
            )
