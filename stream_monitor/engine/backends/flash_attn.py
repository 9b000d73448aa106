"""vLLM's FLASH_ATTN with a tap (native: v1/attention/backends/flash_attn.py)."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from stream_monitor.engine.backends.tap import GraphTappedAttention


class StreamFlashAttentionImpl(GraphTappedAttention, FlashAttentionImpl):
    """The native implementation, and after it the tap."""

    quantised_caches = ("fp8", "fp8_e4m3")


class StreamFlashAttentionBackend(FlashAttentionBackend):
    """`FLASH_ATTN`, unchanged but for the implementation; name, builder, layouts and predicates are inherited."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return StreamFlashAttentionImpl
