"""Models of a few hundred thousand random weights, one for each kind of attention, saved as an engine loads them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY, END = 320, 256
WINDOW = 128
"""Tokens of every sliding window, much less than the tests' contexts."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
    # Large enough that attention is far from uniform and its logits reach the caps below.
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
FEW_BLOCKS = {"num_gpu_blocks_override": 28}
"""Blocks that leave a request's window are soon another request's."""
UNCACHED = {"enable_prefix_caching": False}
"""vLLM's Mamba 2 on CPUs fails with it."""
SCALED_CACHE = {
    "hf_overrides": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {},
            "kv_cache_scheme": {
                "type": "float",
                "num_bits": 8,
                "strategy": "tensor",
                "symmetric": True,
                "dynamic": False,
            },
        }
    }
}
"""What a checkpoint says that brings scales for a KV cache of 8 bits (E4M3)."""
MAMBA = "MambaMixer2 is not softmax attention over a KV cache we know"


@dataclass(frozen=True)
class TinyModel:
    """A configuration of transformers, and what the plan makes of it.

    Attributes:
        config: name of the configuration's class.
        watched: decoder layers that are captured when all are asked for.
        refused: the plan's reasons for the others.
        changes: what differs from SHAPE; None drops an entry.
        engine: engine arguments of its own.
        truth: entries that make transformers compute what vLLM does of the same checkpoint.
        query_norm: weight of the norm on queries, where there is one, for logits of a size of some units.
        cache_scales: of keys and values in a KV cache of 8 bits, in layer 0; half as much in layer 1, and so on.
    """

    config: str
    watched: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    refused: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)
    query_norm: float = 3.0
    cache_scales: tuple[float, float] | None = None

    def scales_of(self, layer: int) -> tuple[float, float]:
        """Of keys and values of a layer that keeps them in 8 bits."""
        assert self.cache_scales is not None
        of_keys, of_values = self.cache_scales
        return of_keys / 2**layer, of_values / 2**layer


def windowed(layers: str) -> list[str]:
    """The plan's line for layers with a sliding window."""
    return [f"layers {layers}: sliding window of {WINDOW} tokens"]


MODELS = {
    "qwen3": TinyModel("Qwen3Config"),
    "qwen3_fp8": TinyModel("Qwen3Config", engine=SCALED_CACHE, cache_scales=(0.37, 0.21)),
    "gemma2": TinyModel(
        "Gemma2Config",
        [1, 3],
        windowed("0, 2"),
        {"sliding_window": WINDOW, "attn_logit_softcapping": 8.0, "query_pre_attn_scalar": 32},
        FEW_BLOCKS,
    ),
    "gpt_oss": TinyModel(
        "GptOssConfig",
        [1, 3],
        windowed("0, 2"),
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        FEW_BLOCKS,
    ),
    "llama": TinyModel("LlamaConfig"),
    "qwen3_moe": TinyModel("Qwen3MoeConfig", changes=EXPERTS | {"num_experts": 4}),
    "mixtral": TinyModel("MixtralConfig", changes={"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma3": TinyModel(
        "Gemma3TextConfig",
        [5],
        windowed("0-4, 6-7"),
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "num_hidden_layers": 8},
    ),
    "gemma3n": TinyModel(
        "Gemma3nTextConfig",
        [4],
        [
            *windowed("0-3, 5-8"),
            "layers 5-8: shares the KV cache of model.layers.3.self_attn.attn",
            "layers 9: shares the KV cache of model.layers.4.self_attn.attn",
        ],
        {
            "sliding_window": WINDOW,
            "num_hidden_layers": 10,
            "num_kv_shared_layers": 5,
            "intermediate_size": [128] * 10,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 10,
            "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        },
        query_norm=0.5,
    ),
    "gemma4": TinyModel(
        "Gemma4TextConfig",
        [5, 11],
        windowed("0-4, 6-10"),
        {
            "sliding_window": WINDOW,
            "num_hidden_layers": 12,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
        },
        query_norm=0.15,
    ),
    "olmo3": TinyModel("Olmo3Config", [3], windowed("0-2"), {"head_dim": None, "sliding_window": WINDOW}),
    "cohere2": TinyModel(
        "Cohere2Config",
        [3],
        [f"layers 0-2: sliding window of {WINDOW + 1} tokens"],
        {"head_dim": None, "sliding_window": WINDOW},
        # vLLM counts the query's own token apart (model_executor/models/commandr.py), transformers among the window's.
        truth={"sliding_window": WINDOW + 1},
    ),
    "llama4": TinyModel(
        "Llama4TextConfig",
        [3],
        ["layers 0-2: ChunkedLocalAttention is not softmax attention over a KV cache we know"],
        {
            "attention_chunk_size": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 1,
        },
    ),
    "glm4": TinyModel("Glm4Config"),
    "glm4_moe": TinyModel(
        "Glm4MoeConfig",
        changes=EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "granite_hybrid": TinyModel(
        "GraniteMoeHybridConfig",
        [2],
        [f"layers 0-1, 3: {MAMBA}"],
        {
            "head_dim": None,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
        },
        UNCACHED,
    ),
    "falcon_h1": TinyModel(
        "FalconH1Config",
        [0, 1, 2, 3],
        [f"layers 4-7: {MAMBA}"],
        {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16},
        UNCACHED,
    ),
    "mistral": TinyModel("MistralConfig", [], windowed("0-3"), {"sliding_window": WINDOW}),
    "deepseek_v2": TinyModel(
        "DeepseekV2Config",
        [],
        ["layers 0-3: latent attention (MLA) keeps no per-head keys", "layers 0-3: head size 576 above 512"],
        EXPERTS
        | {
            "head_dim": None,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "q_lora_rank": 32,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        },
    ),
}


def make_model(folder: Path, name: str) -> None:
    """Write weights (float32), configuration and a tokenizer of single bytes into `folder`. The same on every call."""
    torch.manual_seed(0)
    model = MODELS[name]
    entries = {key: value for key, value in (SHAPE | model.changes).items() if value is not None}
    config = getattr(transformers, model.config)(**entries)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("sinks"):  # near the largest logits, so that they take a good part of the mass
            torch.nn.init.normal_(parameter, mean=16.0, std=2.0)
        if parameter_name.endswith("q_norm.weight"):
            torch.nn.init.constant_(parameter, model.query_norm)
    for layer, decoder in enumerate(network.model.layers if model.cache_scales else []):
        for name_of, scale in zip("kv", model.scales_of(layer), strict=True):
            decoder.self_attn.register_buffer(f"{name_of}_scale", torch.tensor([scale]))
    network.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)} | {"<end>": END}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>").save_pretrained(folder)
