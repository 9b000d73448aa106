"""How much of the attention a mask leaves out, against both denominators in use.

A pair is one query block, one key block, one query head and layer. The paper divides by the full **square** of query
and key blocks, half of which causality forbids already; what a layer **could** read are the pairs on and below the
diagonal, inside its window if it has one. Forced blocks count as kept.
"""

from dataclasses import dataclass

from stream_kernels.prefill import PrefillSummary
from stream_kernels.search import NO_BLOCK


@dataclass(frozen=True)
class PairCount:
    """Pairs of blocks: `kept` by the mask, `causal` that the layers could read, `square` that there are."""

    kept: int = 0
    causal: int = 0
    square: int = 0

    def __add__(self, other: "PairCount") -> "PairCount":
        return PairCount(self.kept + other.kept, self.causal + other.causal, self.square + other.square)

    @property
    def pruned_of_square(self) -> float:
        """Share of the square that is not kept."""
        return 1 - self.kept / self.square

    @property
    def pruned_of_causal(self) -> float:
        """Share of what the layers could read that is not kept."""
        return 1 - self.kept / self.causal


def count_pairs(found: PrefillSummary, block_size: int, window: int) -> PairCount:
    """Of one layer's masks over a whole prompt; `window` is 0 for a layer that sees everything."""
    blocks, heads, _ = found.block_ids.shape
    first, last = found.first_position, found.first_position + found.rows - 1
    oldest = (first - window + 1).clamp(min=0) // block_size if window else 0 * first
    kept = (found.block_ids != NO_BLOCK).sum() + heads * (found.forced_ids != NO_BLOCK).sum()
    return PairCount(
        kept=int(kept),
        causal=heads * int((last // block_size - oldest + 1).sum()),
        square=heads * blocks * (int(last[-1]) // block_size + 1),
    )
