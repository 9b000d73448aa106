"""Attention layers and their caches.

Paths are under `vllm/`, read in 0.26.0 and 0.32.0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stream_monitor.engine.compat.engine import model_layers, platform_name
from stream_monitor.engine.plan import LayerFacts

MOST_HEAD_DIM = {"cpu": 512, "cuda": 256}
"""Largest head that the search of a platform takes, and is tested with; vLLM's CPU attention takes no larger one."""


def attention_layers(vllm_config: Any) -> list[tuple[LayerFacts, Any]]:
    """Every layer of this rank that keeps something of the context, with its facts
    (model_executor/layers/attention_layer_base.py, model_executor/layers/attention/attention.py)."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index

    from stream_monitor.engine.backends.tap import TappedAttention

    # Layers of a draft model of its own are called draft..., those of EAGLE and the like are numbered on from the
    # model's last (`start_layer_id` in model_executor/models/llama_eagle.py), and some that predict several tokens
    # begin at 0 again, under mtp (model_executor/models/qwen3_next_mtp.py, mimo_v2_mtp.py).
    of_model = model_layers(vllm_config) if vllm_config.speculative_config is not None else None
    found = []
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if not isinstance(layer, AttentionLayerBase):
            continue  # such as a fused mixture-of-experts layer
        index = extract_layer_index(name)
        impl = getattr(layer, "impl", None)
        attention = getattr(layer, "attn_type", "decoder")
        facts = LayerFacts(
            name=name,
            index=index,
            kind=type(layer).__name__,
            implementation="-" if impl is None else type(impl).__name__,
            query_heads=int(getattr(layer, "num_heads", 0)),
            kv_heads=int(getattr(layer, "num_kv_heads", 0)),
            head_dim=int(getattr(layer, "head_size", 0)),
            scale=float(getattr(impl, "scale", 0.0)),
            tapped=isinstance(impl, TappedAttention),
            attention_type=str(getattr(attention, "value", attention)),
            kv_cache_dtype=str(getattr(layer, "kv_cache_dtype", "auto")),
            sliding_window=_sliding_window(layer),
            alibi=getattr(impl, "alibi_slopes", None) is not None,
            shares_kv_with=getattr(layer, "kv_sharing_target_layer_name", None) or "",
            draft=_of_draft_model(name) or (of_model is not None and index >= of_model),
            most_head_dim=MOST_HEAD_DIM.get(platform_name(), 0),
            quantised_caches=getattr(impl, "quantised_caches", ()),
            varying_scales=_varying_scales(layer),
        )
        found.append((facts, layer))
    return found


def _of_draft_model(name: str) -> bool:
    return name.startswith("draft") or "mtp" in name.split(".")


def _sliding_window(layer: Any) -> int:
    """Window in tokens, 0 for none. The layer says None, its CPU implementation -1 (v1/attention/backends/cpu_attn.py),
    implementations on GPUs (window - 1, 0) or (-1, -1); either may have it alone."""
    windows = [getattr(layer, "sliding_window", None)]
    of_impl = getattr(getattr(layer, "impl", None), "sliding_window", None)
    windows.append(of_impl[0] + 1 if isinstance(of_impl, tuple) else of_impl)
    return max([0, *(window for window in windows if isinstance(window, int))])


def _varying_scales(layer: Any) -> bool:
    """Whether a quantised cache has one scale for each head (model_executor/layers/quantization/compressed_tensors), or
    the first forward pass will find them (`calculate_kv_scales`, in 0.26; 0.28 has it no more)."""
    sizes = [scale.numel() for name in ("_k_scale", "_q_scale") if (scale := getattr(layer, name, None)) is not None]
    return max(sizes, default=1) > 1 or bool(getattr(layer, "calculate_kv_scales", False))


def type_of_8_bits(layer: Any) -> Any | None:
    """Torch type of the keys in a layer's cache where they have 8 bits, else None: the engine keeps such a cache as
    bytes (`STR_DTYPE_TO_TORCH_DTYPE` in utils/torch_utils.py)."""
    import torch

    types = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    return types.get(layer.kv_cache_dtype)


def query_type(layer: Any, model_type: Any) -> Any:
    """Torch type of the queries that a layer's implementation is handed (`query_quant` in
    model_executor/layers/attention/attention.py)."""
    return model_type if layer.query_quant is None else type_of_8_bits(layer)


def logit_scale(layer: Any) -> float:
    """Factor from the product of a query, as the implementation is handed it, and a stored key to the logit: what they
    were divided by when they were quantised is part of it."""
    scale = float(layer.impl.scale)
    if type_of_8_bits(layer) is not None:
        scale *= layer._k_scale_float
        if layer.query_quant is not None:
            scale *= layer._q_scale_float
    return scale


def soft_cap(layer: Any) -> float:
    """Bound c of the logits, c * tanh(logit / c), 0 for none (`logits_soft_cap` of the implementation)."""
    return float(getattr(layer.impl, "logits_soft_cap", 0) or 0)


def learned_sinks(layer: Any) -> Any | None:
    """A copy of the learned sink logits of this rank's query heads, float32 [heads]; None for none.

    Call after the weights are in, and again when they were replaced. The engine computes with them in bfloat16 or
    float32, which this copy holds exactly; others it casts to float32 itself.
    """
    sinks = getattr(layer.impl, "sinks", None)
    return None if sinks is None else sinks.detach().float().clone()


@dataclass(frozen=True)
class PagedLayerCache:
    """The KV cache of one layer, a view of [pages, kv_heads, page_size, 2 * head_dim], and the group it belongs to.
    What the engine keeps as bytes is of `key_type`."""

    tensor: Any
    group: int
    key_type: Any | None = None

    @property
    def typed(self) -> Any:
        """The cache as numbers, whose type may be one that torch does not index."""
        return self.tensor if self.key_type is None else self.tensor.view(self.key_type)


def layer_caches(
    runner: Any, names: list[str], static_forward_context: dict[str, Any], contiguous_tiles: bool
) -> list[PagedLayerCache]:
    """Caches of the named layers; call after the final `initialize_kv_cache`.

    All backends of ours see [pages, kv_heads, page_size, 2 * head_dim], keys before values in the last dimension. On
    CPUs a (page, head) tile is contiguous (`contiguous_tiles`) and ordered by the kernel; on GPUs the layout, NHD or
    HND, is in the strides.

    Raises:
        ValueError: a cache is not of that shape.
    """
    groups = {
        name: group_id
        for group_id, group in enumerate(runner.kv_cache_config.kv_cache_groups)
        for name in group.layer_names
    }
    caches = []
    for name in names:
        layer = static_forward_context[name]
        tensor = layer.kv_cache
        if tensor.dim() != 4 or tensor.shape[1] != layer.num_kv_heads or tensor.shape[3] != 2 * layer.head_size:
            raise ValueError(f"unknown KV cache shape {tuple(tensor.shape)} in {name}")
        packed = (tensor.shape[2] * tensor.shape[3], tensor.shape[3], 1)
        if tensor.stride(3) != 1 or (contiguous_tiles and tensor.stride()[1:] != packed):
            raise ValueError(f"unknown KV cache strides {tensor.stride()} in {name}")
        caches.append(PagedLayerCache(tensor, groups[name], type_of_8_bits(layer)))
    return caches


def cache_writer(layer: Any) -> Callable[[Any, Any, Any], None]:
    """A function (key [tokens, kv_heads, head_dim], cache like a layer's, slots int64 [tokens]) that has the engine
    store keys, values zero (`do_kv_cache_update` of v1/attention/backends/*.py). In a cache of 8 bits, `key` is what
    shall be stored there."""
    import torch

    factor = 1.0
    if type_of_8_bits(layer) is not None:
        # A little more than the engine divides by: its quotient is rounded, and CPUs cut off what 8 bits do not hold.
        factor = layer._k_scale_float * (1 + 1 / 64)

    def write(key: Any, cache: Any, slots: Any) -> None:
        layer.impl.do_kv_cache_update(layer, key * factor, torch.zeros_like(key), cache, slots)

    return write
