"""Greedy decoding with attention computed here, dense or restricted to kept blocks."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile

import torch

from stream_monitor.tracing.attention import Attend, LayerInputs
from stream_monitor.tracing.layer import TraceOptions, attend, search_layer
from stream_monitor.tracing.model import TracedModel
from stream_monitor.tracing.pruning import PairCount, count_pairs


@dataclass
class RestrictedAttention:
    """Attention to the kept and the forced blocks alone, every query with a search of its own.

    Attributes:
        options: the search; its attention is `pruned`.
        pairs: of blocks in the contexts read so far.
        keys_read: key-equivalents that the search read there, per query head and query block, a value a layer.
    """

    options: TraceOptions
    pairs: PairCount = field(default_factory=PairCount)
    keys_read: list[float] = field(default_factory=list)

    def read(self, inputs: LayerInputs) -> torch.Tensor:
        """Output [Q, H, Dv] over a context, which is counted."""
        found = search_layer(inputs, self.options)
        self.pairs += count_pairs(found, self.options.search.block_size, inputs.window)
        self.keys_read.append(float(found.keys_read.mean()))
        return attend(inputs, found, self.options)

    def decode(self, inputs: LayerInputs) -> torch.Tensor:
        """Output [1, H, Dv] of a token that was decoded."""
        return attend(inputs, search_layer(inputs, self.options), self.options)


def greedy(model: TracedModel, ids: list[int], read: Attend, decode: Attend) -> tuple[torch.Tensor, Iterator[int]]:
    """Reads `ids`, T tokens: float32 [T, C] (see `TracedModel.run`), and the likeliest tokens that follow.

    The tokens have no end; each costs a pass, made when it is asked for.

    Args:
        read: computes attention over `ids`.
        decode: computes it for each token after them.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    hidden = model.run(ids, read, cache)

    def follow(last: torch.Tensor) -> Iterator[int]:
        while True:
            token = int(model.logits(last).argmax())
            yield token
            last = model.run([token], decode, cache)

    return hidden, follow(hidden[-1:])


def generate(
    model: TracedModel, ids: list[int], read: Attend, decode: Attend, tokens: int, stop: Collection[int]
) -> list[int]:
    """At most `tokens` greedy tokens after `ids`, up to the first of `stop`, which is left out."""
    _, following = greedy(model, ids, read, decode)
    return list(takewhile(lambda token: token not in stop, islice(following, tokens)))


def stop_tokens(model: TracedModel) -> set[int]:
    """Tokens that end an answer, by the model's generation settings and by its tokenizer."""
    ends = model.decoder.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in (*listed, model.tokenizer.eos_token_id) if token is not None}
