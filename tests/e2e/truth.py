"""Attention recomputed from scratch by Hugging Face transformers, and texts to compute it on."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import AttentionInterface

Attention = Callable[..., Any]

CHUNK = 512
"""Prompt tokens per forward pass, so that no [T, T] matrix is ever held."""


def nearest(quotients: torch.Tensor) -> torch.Tensor:
    """The E4M3 numbers next to float32 ones, as vLLM's GPU kernels choose them."""
    return quotients.clamp(-448, 448).to(torch.float8_e4m3fn)


def towards_zero(quotients: torch.Tensor) -> torch.Tensor:
    """The E4M3 numbers next to float32 ones on the side of zero, as vLLM's CPU cache writer chooses them."""
    rounded = nearest(quotients)
    beyond = rounded.float().abs() > quotients.abs()
    return (rounded.view(torch.uint8) - beyond.to(torch.uint8)).view(torch.float8_e4m3fn)


@dataclass(frozen=True)
class EightBits:
    """How an engine keeps keys and values in 8 bits.

    Attributes:
        rounding: of the numbers divided by their scale.
        scales: of a layer's keys and values.
        queries: these are rounded as well, with a scale of 1.
    """

    rounding: Callable[[torch.Tensor], torch.Tensor]
    scales: Callable[[int], tuple[float, float]] = lambda layer: (1.0, 1.0)
    queries: bool = False

    def kept(self, layer: int, *states: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value states of a layer as its attention sees them."""

        def rounded(values: torch.Tensor, scale: float) -> torch.Tensor:
            return (self.rounding(values.float() / scale).float() * scale).to(values.dtype)

        query, key, value = states
        key_scale, value_scale = self.scales(layer)
        return [rounded(query, 1.0) if self.queries else query, rounded(key, key_scale), rounded(value, value_scale)]


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
    eight_bits: EightBits | None = None,
    **config: object,
) -> NDArray[np.float32]:
    """Post-softmax attention of the query tokens at positions `first` onwards, teacher-forced.

    The rows themselves run eager; the prompt before them runs with torch's fused attention, which forms no matrix (and
    which has neither soft caps nor learned sinks: for models with those, `first` is 0).

    `eight_bits` says how keys and values are kept, if not as they are; `config` overrides entries of the model's
    configuration.

    Returns:
        float32 [rows, layers, query_heads, len(token_ids)], zero at keys after the row's position.
    """
    prompt_attention = "sdpa" if first else "eager"
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, attn_implementation=prompt_attention, **config
    ).eval()
    ids = torch.tensor([token_ids])
    cache = None
    with torch.inference_mode(), _rounded(eight_bits):
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


@contextlib.contextmanager
def _rounded(eight_bits: EightBits | None) -> Iterator[None]:
    """Every attention function of transformers gets what the engine keeps."""
    choose = AttentionInterface.get_interface

    def get_interface(functions: AttentionInterface, name: str, default: Attention) -> Attention:
        attend = choose(functions, name, default)

        def attend_to_kept(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if eight_bits is not None:
                query, key, value = eight_bits.kept(module.layer_idx, query, key, value)
            return attend(module, query, key, value, *args, **kwargs)

        return attend_to_kept

    with patch.object(AttentionInterface, "get_interface", get_interface):
        yield


def block_masses(rows: NDArray[np.float32], block_size: int) -> NDArray[np.float64]:
    """Sum attention [..., keys] over key blocks: [..., blocks]."""
    keys = rows.shape[-1]
    padded = np.zeros((*rows.shape[:-1], -(-keys // block_size) * block_size))
    padded[..., :keys] = rows
    return padded.reshape(*rows.shape[:-1], -1, block_size).sum(-1)
