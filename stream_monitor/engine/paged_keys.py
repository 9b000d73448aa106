"""The engine's KV cache as the search reads it, its layout read off the engine's own writer."""

from dataclasses import replace
from typing import Any

import torch

from stream_kernels.layout import DeviceKeys, KeyLayout, PagedKeys, probe_permutation
from stream_monitor.engine.compat.layers import (
    PagedLayerCache,
    cache_writer,
    learned_sinks,
    logit_scale,
    soft_cap,
)


def paged_keys(caches: list[PagedLayerCache], layers: list[Any], dtype: torch.dtype) -> list[PagedKeys]:
    """The watched layers' keys, which the model computes in `dtype`; raises ValueError if the layout is not one the
    search knows."""
    layouts: dict[tuple[Any, ...], KeyLayout] = {}
    keys = []
    for cache, layer in zip(caches, layers, strict=True):
        stored = cache.typed
        shape = (*stored.shape[1:], stored.dtype)
        if shape not in layouts:
            layouts[shape] = _probe(layer, replace(cache, tensor=torch.zeros_like(cache.tensor[:1])), dtype)
        keys.append(
            PagedKeys(stored, layouts[shape], logit_scale(layer), cache.group, soft_cap(layer), learned_sinks(layer))
        )
    return keys


def _probe(layer: Any, scratch: PagedLayerCache, dtype: torch.dtype) -> KeyLayout:
    """`scratch` is one page of a cache like the layer's."""
    _, kv_heads, page, width = scratch.tensor.shape
    store, slots = cache_writer(layer), torch.arange(page)

    def write(key: torch.Tensor) -> torch.Tensor:
        store(key, scratch.tensor, slots)
        stored: torch.Tensor = scratch.typed[0, -1].flatten()[: page * width // 2]
        return stored

    return KeyLayout.from_permutation(probe_permutation(write, page, width // 2, kv_heads, dtype, scratch.typed.dtype))


def device_keys(caches: list[PagedLayerCache], layers: list[Any]) -> list[DeviceKeys]:
    """The watched layers' keys on a GPU, whatever the order of heads and tokens; raises ValueError as `DeviceKeys`."""
    return [
        DeviceKeys(
            cache.typed.transpose(1, 2)[..., : cache.tensor.shape[3] // 2],
            logit_scale(layer),
            cache.group,
            soft_cap(layer),
            learned_sinks(layer),
        )
        for cache, layer in zip(caches, layers, strict=True)
    ]
