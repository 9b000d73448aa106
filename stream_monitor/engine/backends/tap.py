"""Where an attention layer leaves the query rows of a step."""

from typing import Any, Protocol

import torch


class QueryTap(Protocol):
    """Takes the query rows of one watched layer during the forward pass.

    Must not raise, wait or allocate without bound.
    """

    def take(self, query: torch.Tensor, query_start_loc: Any) -> None:
        """Keep the last row of each request.

        Args:
            query: [tokens, query_heads, head_dim], as handed to the native kernel (after rotary embedding).
            query_start_loc: int32 [requests + 1], first token of each request in `query`; None where the tap knows
                the runner's own.
        """


class TappedAttention:
    """Mixin of an `AttentionImpl` subclass.

    Attributes:
        stream_tap: None on layers the plan does not watch.
        quantised_caches: the `kv_cache_dtype` of quantised KV caches whose keys, and the queries that the tap is shown,
            are those that the native kernel multiplies.
    """

    stream_tap: QueryTap | None = None
    quantised_caches: tuple[str, ...] = ()


class GraphTappedAttention(TappedAttention):
    """Mixin for GPU implementations: delegates attention whole, then lets the tap gather rows.

    Metadata differ from backend to backend and the padded token count of a CUDA graph is in none of them, so nothing is
    read from them. Also without metadata, in the engine's profiling run, the tap's kernel is launched: there it is
    compiled, before any graph is captured.
    """

    def forward(self, layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the native `forward`: query [tokens, query_heads, head_dim]."""
        result: torch.Tensor = super().forward(layer, query, *args, **kwargs)  # type: ignore[misc]
        if self.stream_tap is not None:
            self.stream_tap.take(query, None)
        return result
