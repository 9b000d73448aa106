"""Feed-forward layers over part of the tokens at a time: their inner activations are several times a layer's output."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

CHUNK_TOKENS = 2048
"""Taken at a time: with 4,864 inner channels 40 MiB of float32, where 128k tokens would hold 2.4 GiB, several times."""


def chunk_feed_forward(decoder: torch.nn.Module) -> None:
    """Makes each module that transformers calls `mlp` take long inputs in parts; what it gives stays the same."""
    for name, module in decoder.named_modules():
        if name.rpartition(".")[2] == "mlp":
            # The instance's own, which `Module.__call__` finds before the class's.
            module.forward = partial(_in_chunks, module.forward)


def _in_chunks(forward: Callable[..., Any], hidden: torch.Tensor, *others: Any, **named: Any) -> Any:
    """`forward` of [B, Q, C]; at once where there is more to it than one tensor in and one out."""
    if others or named or hidden.ndim != 3 or hidden.shape[1] <= CHUNK_TOKENS:
        return forward(hidden, *others, **named)
    parts = hidden.split(CHUNK_TOKENS, dim=1)
    first = forward(parts[0])
    if not isinstance(first, torch.Tensor):
        return forward(hidden)
    # Not `cat`, which would hold the output twice.
    out = first.new_empty((*hidden.shape[:2], first.shape[-1]))
    for place, part in zip(out.split(CHUNK_TOKENS, dim=1), parts, strict=True):
        place.copy_(first if part is parts[0] else forward(part))
    return out
