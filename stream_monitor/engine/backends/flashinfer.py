"""vLLM's FLASHINFER with a tap (native: v1/attention/backends/flashinfer.py)."""

from vllm.v1.attention.backends.flashinfer import FlashInferBackend, FlashInferImpl

from stream_monitor.engine.backends.tap import GraphTappedAttention


class StreamFlashInferImpl(GraphTappedAttention, FlashInferImpl):
    """The native implementation, and after it the tap."""


class StreamFlashInferBackend(FlashInferBackend):
    """`FLASHINFER`, unchanged but for the implementation; name, builder, layouts and predicates are inherited."""

    @staticmethod
    def get_impl_cls() -> type[FlashInferImpl]:
        return StreamFlashInferImpl
