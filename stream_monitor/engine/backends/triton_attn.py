"""vLLM's TRITON_ATTN with a tap (native: v1/attention/backends/triton_attn.py)."""

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from stream_monitor.engine.backends.tap import GraphTappedAttention


class StreamTritonAttentionImpl(GraphTappedAttention, TritonAttentionImpl):
    """The native implementation, and after it the tap."""

    quantised_caches = ("fp8", "fp8_e4m3")


class StreamTritonAttentionBackend(TritonAttentionBackend):
    """`TRITON_ATTN`, unchanged but for the implementation; name, builder, layouts and predicates are inherited."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return StreamTritonAttentionImpl
