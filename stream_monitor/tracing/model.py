"""Loads a decoder for tracing, refuses what cannot be traced with the reason, and turns prompts into tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stream_monitor.tracing.attention import (
    IMPLEMENTATION,
    Attend,
    LayerInputs,
    attending,
    dense_attention,
    register,
)
from stream_monitor.tracing.chunks import chunk_feed_forward
from stream_monitor.tracing.errors import TracingError

_PROBE_TOKENS = 48
"""Length of the pass that compares our attention with the model's own when it is loaded."""

_PROBE_TOLERANCE = 1e-3
"""Of that comparison, relative to the largest value; float32 leaves about 1e-5."""

_LOGIT_TOKENS = 256
"""Positions whose logits over the vocabulary are held at a time: 150 MiB for a vocabulary of 152,000."""

_KNOWN_LAYERS = ("full_attention", "sliding_attention")
"""Layer types of transformers' configurations that are causal softmax attention over keys, all or a window of them."""


@dataclass(frozen=True)
class TracedModel:
    """A decoder whose attention layers this package computes.

    Attributes:
        name: as it was asked for.
        decoder: transformers' causal language model, in float32.
        tokenizer: its tokenizer.
        windows: per layer, keys a token sees, itself included; 0 where it sees all before it.
        query_heads: per layer.
        limit: most tokens that the model was made for; None if it does not say.
        linear: what linear layers are computed in. Half-precision ones accumulate in float32; attention, norms and
            what passes from layer to layer stay float32.
    """

    name: str
    decoder: Any
    tokenizer: Any
    windows: tuple[int, ...]
    query_heads: int
    limit: int | None
    linear: torch.dtype = torch.float32

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.windows)

    def run(self, ids: Sequence[int], attend: Attend, cache: Any = None) -> torch.Tensor:
        """One pass over Q tokens: float32 [Q, C], what the last layer leaves, after the final norm.

        Args:
            ids: the tokens.
            attend: computes each layer's attention.
            cache: a transformers `DynamicCache` of what stood before them, which gets their keys too; None if nothing
                does. Made without a config, so that it keeps every key of sliding layers as well.
        """
        with self._arithmetic():
            return _hidden(self.decoder, ids, attend, cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, float32 [Q, V], of what `run` gave; take few positions at a time."""
        with self._arithmetic():
            return _logits(self.decoder, hidden).float()

    def _arithmetic(self) -> torch.autocast:
        half = self.linear != torch.float32
        return torch.autocast(self.decoder.device.type, self.linear if half else None, enabled=half)

    def logit_tiles(self, tokens: int) -> list[slice]:
        """Positions to take logits of at a time."""
        return [slice(first, first + _LOGIT_TOKENS) for first in range(0, tokens, _LOGIT_TOKENS)]

    def prompt_tokens(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with the special ones that the tokenizer puts around it.

        Raises:
            TracingError: it is empty, or longer than the model's limit.
        """
        if not text.strip():
            raise TracingError("the prompt is empty")
        return self._checked(self.tokenizer(text)["input_ids"])

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of chat messages by the model's template, up to where the assistant begins to answer.

        Raises:
            TracingError: there is none, or no template, or they are longer than the model's limit.
        """
        if not messages:
            raise TracingError("there are no messages")
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates raise what they like
            raise TracingError(f"the chat template of {self.name} does not take these messages: {error}") from error
        return self._checked(ids["input_ids"])

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise TracingError("the prompt is empty")
        if self.limit is not None and len(ids) > self.limit:
            raise TracingError(f"the prompt has {len(ids):,} tokens; {self.name} is made for {self.limit:,} at most")
        return ids


def read_messages(path: Path) -> list[dict[str, str]]:
    """Chat messages of a JSON file: a list of objects with the strings `role` and `content`, at least one.

    Raises:
        TracingError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TracingError):
            raise
        raise TracingError(f"{path} is not JSON: {error}") from error
    fits = isinstance(found, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in found
    )
    if not fits:
        raise TracingError(f"{path} is not a list of messages with the strings role and content")
    if not found:
        raise TracingError(f"there are no messages in {path}")
    return list(found)


def read_prompt(path: Path) -> str:
    """A text file in UTF-8.

    Raises:
        TracingError: the file cannot be read, or is blank.
    """
    text = read_file(path)
    if not text.strip():
        raise TracingError(f"the prompt in {path} is empty")
    return text


def read_file(path: Path) -> str:
    """A file in UTF-8, blank or not.

    Raises:
        TracingError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TracingError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TracingError(f"{path} is not text in UTF-8") from error


def load(name: str, device: str = "cpu", linear: torch.dtype = torch.float32) -> TracedModel:
    """Loads a model and tries on a few tokens whether its attention can be computed here.

    Args:
        name: folder of a Hugging Face model, or a name that transformers finds.
        device: of torch.
        linear: see `TracedModel`.

    Raises:
        TracingError: it cannot be read, or cannot be traced.
    """
    import huggingface_hub
    import transformers

    # What they have to say here is either an error, which we raise, or not for the reader of one line.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    register()
    config = _read_config(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        decoder = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attn_implementation=IMPLEMENTATION
        )
    except Exception as error:  # transformers, safetensors and tokenizers raise many kinds for unreadable files
        raise TracingError(f"cannot load {name}: {error}") from error
    decoder.eval().to(device)
    windows, query_heads = _probe(decoder, config)
    chunk_feed_forward(decoder)
    limit = getattr(config, "max_position_embeddings", None)
    return TracedModel(name, decoder, tokenizer, windows, query_heads, limit, linear)


def _read_config(name: str) -> Any:
    """The configuration of the text decoder.

    Raises:
        TracingError: there is none, or it shows already that the model cannot be traced.
    """
    import transformers

    try:
        looks_like_path = name.startswith((".", "/", "~")) or Path(name).exists()
        lacks_config = looks_like_path and not (Path(name) / "config.json").is_file()
    except OSError as error:
        raise TracingError(f"cannot read {name}: {error.strerror}") from None
    if lacks_config:
        raise TracingError(f"{name} is not the folder of a Hugging Face model: it has no config.json")
    try:
        whole = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # as many kinds as there are ways to write a wrong file
        raise TracingError(f"cannot read the configuration of {name}: {error}") from error
    if whole.is_encoder_decoder or type(whole) not in transformers.AutoModelForCausalLM._model_mapping:
        raise TracingError(f"{name} is not a decoder: its type is {whole.model_type}")
    config = whole.get_text_config(decoder=True)
    others = sorted({kind for kind in getattr(config, "layer_types", None) or () if kind not in _KNOWN_LAYERS})
    if others:
        raise TracingError(f"{name} has layers that cannot be traced: {', '.join(others)}")
    return config


def _probe(decoder: Any, config: Any) -> tuple[tuple[int, ...], int]:
    """Runs a few tokens through our dense attention and through the model's own, which must agree.

    Returns the layers' windows and their query heads.

    Raises:
        TracingError: a layer does not come through transformers' attention interface, or computes something else.
    """
    seen: dict[int, LayerInputs] = {}

    def attend(inputs: LayerInputs) -> torch.Tensor:
        seen[inputs.layer] = inputs
        return dense_attention(inputs)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (_PROBE_TOKENS,), generator=generator).tolist()
    ours = _hidden(decoder, ids, attend)
    missing = [layer for layer in range(config.num_hidden_layers) if layer not in seen]
    if missing:
        raise TracingError(f"attention of layers {_ranges(missing)} does not go through transformers' interface")
    if any(0 < inputs.window < _PROBE_TOKENS for inputs in seen.values()):
        shortest = min(inputs.window for inputs in seen.values() if inputs.window)
        ids = ids[:shortest]
        ours = ours[:shortest]
    with torch.inference_mode():
        mine = _logits(decoder, ours)
        try:
            decoder.set_attn_implementation("eager")
            own = decoder(torch.tensor([ids], device=decoder.device), use_cache=False).logits[0]
        finally:
            decoder.set_attn_implementation(IMPLEMENTATION)
    error = float((mine - own).abs().max() / own.abs().max().clamp(min=1e-6))
    if not error <= _PROBE_TOLERANCE:
        raise TracingError(f"the model's attention or logits hold more than is known here (they differ by {error:.1e})")
    layers = [seen[layer] for layer in range(config.num_hidden_layers)]
    heads = {inputs.queries.shape[1] for inputs in layers}
    if len(heads) > 1:
        raise TracingError(f"layers differ in their number of query heads: {sorted(heads)}")
    return tuple(inputs.window for inputs in layers), heads.pop()


def _hidden(decoder: Any, ids: Sequence[int], attend: Attend, cache: Any = None) -> torch.Tensor:
    """See `TracedModel.run`."""
    with torch.inference_mode(), attending(attend):
        tokens = torch.tensor([ids], device=decoder.device)
        out = decoder.base_model(tokens, use_cache=cache is not None, past_key_values=cache)
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden


def _logits(decoder: Any, hidden: torch.Tensor) -> torch.Tensor:
    """See `TracedModel.logits`; a model that does more than this to its logits fails the probe."""
    with torch.inference_mode():
        logits: torch.Tensor = decoder.get_output_embeddings()(hidden)
        softcap = getattr(decoder.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        return softcap * torch.tanh(logits / softcap) if softcap else logits


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0, 2 to 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
