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
        """Output [Q, H, Dv] of tokens that were decoded, each with a search of its own."""
        return attend(inputs, search_layer(inputs, self.options, query_block=1), self.options)


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


def repeated(
    model: TracedModel, ids: list[int], read: Attend, decode: Attend, given: list[int]
) -> tuple[torch.Tensor, int]:
    """Reads `ids` as `greedy` does, and tells how many of the tokens `given` would follow before one differs.

    As long as they agree a token sees what it would see if the model had gone on by itself, so that one pass over all
    that are given shows it. `decode` must treat each row alone.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    hidden = model.run(ids, read, cache)
    expected = torch.tensor(given, device=hidden.device)
    same = model.logits(hidden[-1:]).argmax(-1) == expected[:1]
    if same.all() and len(given) > 1:
        same = torch.cat([same, model.logits(model.run(given[:-1], decode, cache)).argmax(-1) == expected[1:]])
    return hidden, int(same.long().cumprod(0).sum())


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
