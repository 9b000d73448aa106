"""The engine's KV cache as the search reads it, its layout read off the engine's own writer."""

from typing import Any

import torch

from stream_kernels.layout import DeviceKeys, KeyLayout, PagedKeys, probe_permutation
from stream_monitor.engine.compat.layers import PagedLayerCache, cache_writer, learned_sinks, soft_cap


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
