"""Models of a few thousand random weights, and attention inputs drawn at random."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from stream_monitor.tracing.attention import LayerInputs

VOCABULARY = 259
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    # Large enough that attention is far from uniform.
    "initializer_range": 0.3,
}
TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"


def save(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """Writes a model of this type with a tokenizer of one token per byte."""
    torch.manual_seed(0)
    entries = {key: value for key, value in (SHAPE | changes).items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **entries))
    model.save_pretrained(folder)
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def tokens(count: int, seed: int = 0) -> list[int]:
    """Drawn token ids."""
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def inputs(
    length: int, queries: int | None = None, *, softcap: float = 0.0, window: int = 0, value_dim: int = 8
) -> LayerInputs:
    """Of a layer with 6 query heads in groups of 3, float64."""
    rng = torch.Generator().manual_seed(length)
    return LayerInputs(
        layer=0,
        queries=2 * torch.randn(queries or length, 6, 16, generator=rng, dtype=torch.float64),
        keys=torch.randn(length, 2, 16, generator=rng, dtype=torch.float64),
        values=torch.randn(length, 2, value_dim, generator=rng, dtype=torch.float64),
        scale=0.3,
        softcap=softcap,
        window=window,
    )


def logits(given: LayerInputs) -> torch.Tensor:
    """All of them, [H, Q, T], -inf where a row does not see the key."""
    group = given.queries.shape[1] // given.keys.shape[1]
    every = given.scale * given.queries.transpose(0, 1) @ given.keys.repeat_interleave(group, 1).permute(1, 2, 0)
    every = given.softcap * torch.tanh(every / given.softcap) if given.softcap else every
    distance = given.first_query + torch.arange(len(given.queries))[:, None] - torch.arange(len(given.keys))
    hidden = (distance < 0) | (distance >= (given.window or len(given.keys)))
    return every.masked_fill(hidden, -torch.inf)


def output(given: LayerInputs, visible: torch.Tensor | None = None) -> torch.Tensor:
    """Dense attention, [Q, H, Dv]; of the keys that are `visible`, bool [H, Q, T], alone."""
    every = logits(given) if visible is None else logits(given).masked_fill(~visible, -torch.inf)
    group = given.queries.shape[1] // given.keys.shape[1]
    return (every.softmax(-1) @ given.values.repeat_interleave(group, 1).transpose(0, 1)).transpose(0, 1)
