"""Real queries and keys: one forward pass of a model over a text, kept on disk for the next run."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

QUERY_ROWS = 16
"""Query rows kept: the last ones, as in decoding."""

CACHE = Path(os.environ.get("BENCHMARK_CACHE", ".cache/benchmarks"))


@dataclass(frozen=True)
class Attention:
    """What a model's attention layers were given, after position encoding.

    Attributes:
        queries: bfloat16 [L, QUERY_ROWS, H, D]; row i is position T - QUERY_ROWS + i.
        keys: bfloat16 [L, G, T, D], as the engine's cache holds them.
        scale: factor from dot product to logit.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    scale: float

    @property
    def tokens(self) -> int:
        """T, the length of the text."""
        return self.keys.shape[2]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.queries.shape[2] // self.keys.shape[1]


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def of_text(model: Path, ids: list[int]) -> Attention:
    """The attention inputs of `model` over token ids `ids`, from the cache folder or by a forward pass.

    The pass runs in float32 (a CPU without bfloat16 arithmetic is several times slower in it); queries and keys are
    rounded to bfloat16, which is what a cache holds.
    """
    stat = (model / "config.json").stat()
    identity = f"{model.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{ids}"
    path = CACHE / f"attention-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            return Attention(file.get_tensor("queries"), file.get_tensor("keys"), float(file.metadata()["scale"]))
    attention = _forward(model, ids)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({"queries": attention.queries, "keys": attention.keys}, part, {"scale": repr(attention.scale)})
    part.replace(path)
    return attention


def _forward(model: Path, ids: list[int]) -> Attention:
    from transformers import AttentionInterface, AutoModelForCausalLM

    queries: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    scales: set[float] = set()

    def record(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        queries.append(query[0, :, -QUERY_ROWS:].transpose(0, 1).bfloat16())
        keys.append(key[0].bfloat16())
        scales.add(scaling if scaling is not None else query.shape[-1] ** -0.5)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("stream_monitor_benchmark", record)
    decoder = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="stream_monitor_benchmark"
    ).eval()
    with torch.inference_mode():
        decoder.base_model(torch.tensor([ids]), use_cache=False)
    (scale,) = scales
    return Attention(torch.stack(queries), torch.stack(keys), scale)
