"""Attention recomputed from scratch by Hugging Face transformers, and texts to compute it on."""

from pydoc_data.topics import topics

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

CHUNK = 512
"""Prompt tokens per forward pass, so that no [T, T] matrix is ever held."""


def prose(model: str, tokens: int) -> list[int]:
    """The first `tokens` token ids of English prose that ships with Python: its language reference."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids: list[int] = AutoTokenizer.from_pretrained(model)(text[: tokens * 8])["input_ids"]
    assert len(ids) >= tokens
    return ids[:tokens]


def attention_rows(
    model: str,
    token_ids: list[int],
    first: int,
    dtype: torch.dtype,
    layers: list[int] | None = None,
    **config: object,
) -> NDArray[np.float32]:
    """Post-softmax attention of the query tokens at positions `first` onwards, teacher-forced.

    The rows themselves run eager; the prompt before them runs with torch's fused attention, which forms no matrix (and
    which has neither soft caps nor learned sinks: for models with those, `first` is 0).

    `config` overrides entries of the model's configuration.

    Returns:
        float32 [rows, layers, query_heads, len(token_ids)], zero at keys after the row's position.
    """
    prompt_attention = "sdpa" if first else "eager"
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, attn_implementation=prompt_attention, **config
    ).eval()
    ids = torch.tensor([token_ids])
    cache = None
    with torch.inference_mode():
        for begin in range(0, first, CHUNK):
            cache = network(
                ids[:, begin : min(begin + CHUNK, first)], past_key_values=cache, use_cache=True
            ).past_key_values
        network.set_attn_implementation("eager")
        attentions = network(ids[:, first:], past_key_values=cache, output_attentions=True).attentions
    attentions = [layer for layer in attentions if layer is not None]  # a Mamba layer has none, or is not listed
    chosen = attentions
    if layers is not None and len(layers) < len(attentions):
        chosen = [attentions[index] for index in layers]
    return torch.stack([layer[0].float() for layer in chosen]).permute(2, 0, 1, 3).numpy()


def block_masses(rows: NDArray[np.float32], block_size: int) -> NDArray[np.float64]:
    """Sum attention [..., keys] over key blocks: [..., blocks]."""
    keys = rows.shape[-1]
    padded = np.zeros((*rows.shape[:-1], -(-keys // block_size) * block_size))
    padded[..., :keys] = rows
    return padded.reshape(*rows.shape[:-1], -1, block_size).sum(-1)
