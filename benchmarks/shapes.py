"""Models that are a shape alone: a configuration for an engine that makes up the weights."""

import json
from pathlib import Path

SHAPES = {
    # Hidden size, layers, query heads, KV heads, intermediate size, vocabulary, tied embeddings.
    "qwen3-0.6b": (1024, 28, 16, 8, 3072, 151936, True),
    "qwen3-4b": (2560, 36, 32, 8, 9728, 151936, True),
    "qwen3-8b": (4096, 36, 32, 8, 12288, 151936, False),
    "qwen3-32b": (5120, 64, 64, 8, 25600, 151936, False),
}


def write_shape(folder: Path, shape: str, positions: int) -> str:
    """A configuration without weights; its folder."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = SHAPES[shape]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
