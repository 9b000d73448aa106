"""What changes in a model's predictions when later tokens cannot see a sentence.

Attention to all tokens of the sentence is suppressed in every layer and head: its logits are -inf before the softmax,
for rows behind the sentence (thought-anchors' suppression). The sentence itself, and all before it, are computed as
ever; so a suppressed pass begins behind the sentence, on the keys that the unsuppressed one left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stream_monitor.tracing.attention import Attend, dense_attention
from stream_monitor.tracing.model import TracedModel

_KL_FLOOR = 1e-9
"""Added to a mean KL before its logarithm, nats (thought-anchors): a sentence may be out of every layer's reach."""


@dataclass(frozen=True)
class FreePass:
    """A pass in which nothing is suppressed.

    Attributes:
        ids: the context, T tokens.
        hidden: float32 [T, C], see `TracedModel.run`.
        cache: a transformers `DynamicCache` with the keys and values of all tokens.
    """

    ids: list[int]
    hidden: torch.Tensor
    cache: Any


def free_pass(model: TracedModel, ids: list[int], attend: Attend = dense_attention) -> FreePass:
    """Runs the model over `ids`; `attend` may look at the layers, but must give what dense attention gives."""
    from transformers import DynamicCache

    cache = DynamicCache()
    return FreePass(ids, model.run(ids, attend, cache), cache)


def suppressed_hidden(model: TracedModel, free: FreePass, span: tuple[int, int]) -> torch.Tensor:
    """What tokens behind `span` [start, end) leave when they cannot see it: float32 [T - end, C]."""
    from transformers import DynamicCache

    end = span[1]
    cache = DynamicCache()
    for number, layer in enumerate(free.cache.layers):
        cache.update(layer.keys[:, :, :end], layer.values[:, :, :end], number)
    return model.run(free.ids[end:], partial(dense_attention, hidden=span), cache)


def divergences(
    model: TracedModel, free: FreePass, spans: Sequence[tuple[int, int]], since: int = 0
) -> NDArray[np.float64]:
    """KL(free || suppressed) of the next-token distributions, nats: float64 [N, T].

    Args:
        model: that `free` was made with.
        free: the unsuppressed pass.
        spans: tokens [start, end), N of them, each suppressed alone; none reaches the last token.
        since: positions before it are left out, and 0 in the result, as are those up to the end of each span.
    """
    runs = [suppressed_hidden(model, free, span) for span in spans]
    firsts = [max(since, end) for _, end in spans]
    found = np.zeros((len(spans), len(free.ids)))
    # All logits at once would fill the memory; those of the free pass serve every span.
    for tile in model.logit_tiles(len(free.ids)):
        if all(first >= tile.stop for first in firsts):
            continue
        expected = model.logits(free.hidden[tile]).log_softmax(-1)
        share = expected.exp()
        stop = tile.start + len(expected)
        for number, (run, (_, end)) in enumerate(zip(runs, spans, strict=True)):
            first = max(tile.start, firsts[number])
            if first < stop:
                suppressed = model.logits(run[first - end : stop - end]).log_softmax(-1)
                some = slice(first - tile.start, None)
                kl = torch.linalg.vecdot(share[some], expected[some] - suppressed)
                found[number, first:stop] = kl.cpu().numpy()
    return found


def effect(kl: NDArray[np.float64], start: int, end: int | None = None) -> float:
    """Log of the mean of `kl`, float64 [T] in nats, over tokens [start, end)."""
    # Rounding can leave a divergence of nothing just below 0.
    return math.log(max(0.0, float(kl[start:end].mean())) + _KL_FLOOR)
