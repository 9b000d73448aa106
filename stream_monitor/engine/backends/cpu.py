"""vLLM's CPU attention with a tap (native: v1/attention/backends/cpu_attn.py)."""

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from stream_monitor.engine.backends.tap import TappedAttention


class StreamCPUAttentionBackend(CPUAttentionBackend):
    """`CPU_ATTN`, unchanged but for the implementation class; name, builder, layouts and predicates are inherited."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return StreamCPUAttentionImpl


class StreamCPUAttentionImpl(TappedAttention, CPUAttentionBackendImpl):
    """Delegates attention whole, then lets the tap copy query rows."""

    quantised_caches = ("fp8", "fp8_e4m3", "fp8_e5m2")

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the native `forward`: query [tokens, query_heads, head_dim], output [tokens, query_heads * head_dim]."""
        result = super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        if self.stream_tap is not None and attn_metadata is not None:
            self.stream_tap.take(query, attn_metadata.query_start_loc)
        return result
