"""Where an attention layer leaves the query rows of a step."""

from typing import Protocol

import torch


class QueryTap(Protocol):
    """Takes the query rows of one watched layer during the forward pass.

    Must not raise, wait or allocate without bound.
    """

    def take(self, query: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """Keep the last row of each request.

        Args:
            query: [tokens, query_heads, head_dim], as handed to the native kernel (after rotary embedding).
            query_start_loc: int32 [requests + 1], first token of each request in `query`.
        """


class TappedAttention:
    """Mixin of an `AttentionImpl` subclass. `stream_tap` is None on layers the plan does not watch."""

    stream_tap: QueryTap | None = None
