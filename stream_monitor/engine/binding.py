"""What a device is given when it is bound to an engine's KV cache."""

from dataclasses import dataclass
from typing import Any

import torch

from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.compat.layers import PagedLayerCache
from stream_monitor.engine.compat.runner import RunnerView


@dataclass(frozen=True)
class Binding:
    """The watched layers of one worker and the sizes of its engine.

    Attributes:
        runner: vLLM's model runner.
        layers: vLLM's attention layers, in plan order.
        caches: their KV caches.
        total_query_heads: of a layer on this rank.
        query_heads: the watched ones.
        rows: most query rows kept of a batch.
        max_context: tokens.
        dtype: what the model computes keys and queries in.
        query_dtype: of the queries that the taps are shown: another where the engine quantises them.
        generations: of all KV blocks.
    """

    runner: RunnerView
    layers: list[Any]
    caches: list[PagedLayerCache]
    total_query_heads: int
    query_heads: tuple[int, ...]
    rows: int
    max_context: int
    dtype: torch.dtype
    query_dtype: torch.dtype
    generations: BlockGenerations
