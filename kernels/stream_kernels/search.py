"""What every implementation of the search takes and gives: parameters in, block summaries out.

`reference.py` (plain torch, the specification), `cpu.py` (numba) share this module, so that one parity test drives
them all. Symbols in shapes: L watched layers, R rows (one query token of one request each), H query heads, G KV heads,
D head size, K = `top_k`, F = `sink_blocks + recent_blocks`.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["descent", "beam", "exact"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)

NO_BLOCK = -1
"""Fills `BlockSummary.block_ids` where a row has fewer than K inner blocks."""

PROMPT_MIN_GAIN, PROMPT_WIDTH = 1e-5, 32
"""`min_gain` and `width` for a whole prompt. A query block's rows share what is read, so that reading on costs each a
32nd of what it costs a decoded token; they look for more blocks than one row does; and what is missed is missing from
all that is read after it. With the defaults, made for decoded tokens, a model that was left the kept blocks mistook one
needle for another (RULER's `niah_multikey_2`)."""


@dataclass(frozen=True)
class SearchConfig:
    """Parameters of the top-k block search.

    Attributes:
        strategy: `descent` (the paper's hierarchical search), `beam` (over block summaries) or `exact` (the oracle).
        block_size: tokens per key block; a power of two from 8 to 128.
        top_k: inner blocks kept per query head.
        sink_blocks, recent_blocks: first and last blocks, kept on top of `top_k` and left out of the search.
        probe_keys: descent's r, keys of the centre block scored per branch.
        width: most candidates, in multiples of `top_k` (of a KV head's group when shared); under `descent` they are
            also what each round keeps.
        share_kv_group: the query heads of one KV head search together.
        rerank: at the leaves every query head takes exact dot products with every key of the candidates and keeps the
            K blocks of largest exact mass. Without it the last round's scores decide (the paper's descent), and only
            the K blocks kept are then read in full, to give their mass.
        box_width: nodes that beam keeps per level of the summary pyramid.
        upper_width: the same of levels above the first, where it is less. Contexts of half a million tokens and more
            have such levels, and a node kept there leads to 64 blocks and more.
        outlier_share: of the nodes that beam scores on a level, how many it looks at twice, in 256ths rounded up: all
            by the mean of their keys, then the best of them by their outlier keys too.
        outlier_keys: outliers that a node holds. A second costs half as much memory again, and finds more where reads
            are many: most of what one misses then is single keys that lie nearly as far out.
        spread_weight: what beam multiplies the variance of a node's logits by, as its keys' spread has it. Above 1,
            nodes that say little of their keys come before those that are likely good: that finds more where a search
            reads a twentieth of the keys and more, and less where it reads few.
        min_gain: beam reads on while the heads of a unit may expect to gain this share of their attention, summed, per
            candidate read; 0 always reads `width * top_k`.
    """

    strategy: Strategy = "descent"
    block_size: int = 32
    top_k: int = 8
    sink_blocks: int = 1
    recent_blocks: int = 2
    probe_keys: int = 4
    width: int = 16
    share_kv_group: bool = True
    rerank: bool = True
    box_width: int = 160
    upper_width: int = 100
    outlier_share: float = 0.5
    outlier_keys: int = 1
    spread_weight: float = 1.0
    min_gain: float = 0.0005

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is {self.strategy!r}; valid: {', '.join(STRATEGIES)}")
        if self.block_size not in (8, 16, 32, 64, 128):
            raise ValueError(f"block_size is {self.block_size}; valid: 8, 16, 32, 64, 128")
        if not 1 <= self.top_k <= 4096:
            raise ValueError(f"top_k is {self.top_k}; valid: 1 to 4096")
        if not 0 <= self.sink_blocks <= 16:
            raise ValueError(f"sink_blocks is {self.sink_blocks}; valid: 0 to 16")
        if not 1 <= self.recent_blocks <= 64:
            raise ValueError(f"recent_blocks is {self.recent_blocks}; valid: 1 to 64")
        if not 1 <= self.probe_keys <= self.block_size:
            raise ValueError(f"probe_keys is {self.probe_keys}; valid: 1 to block_size ({self.block_size})")
        if not 1 <= self.width <= 256:
            raise ValueError(f"width is {self.width}; valid: 1 to 256")
        if not 1 <= self.box_width <= 256:
            raise ValueError(f"box_width is {self.box_width}; valid: 1 to 256")
        if not 1 <= self.upper_width <= 256:
            raise ValueError(f"upper_width is {self.upper_width}; valid: 1 to 256")
        if not 0 <= self.outlier_share <= 1:
            raise ValueError(f"outlier_share is {self.outlier_share}; valid: 0 to 1")
        if not 1 <= self.outlier_keys <= 4:
            raise ValueError(f"outlier_keys is {self.outlier_keys}; valid: 1 to 4")
        if not 0 <= self.spread_weight <= 16:
            raise ValueError(f"spread_weight is {self.spread_weight}; valid: 0 to 16")
        if not 0 <= self.min_gain <= 1:
            raise ValueError(f"min_gain is {self.min_gain}; valid: 0 to 1")

    @property
    def first_lot(self) -> int:
        """Blocks that beam reads before it asks whether to read on: a multiple of `top_k`, enough for a regression."""
        return self.top_k * -(-8 // self.top_k)

    def nodes_kept(self, level: int) -> int:
        """How many nodes of a level of the pyramid, 1 or above, beam looks into."""
        return self.box_width if level == 1 else min(self.box_width, self.upper_width)

    @property
    def outlier_256ths(self) -> int:
        """`outlier_share` as every implementation counts it, so that none rounds another way."""
        return round(256 * self.outlier_share)

    @property
    def forced_blocks(self) -> int:
        """F, the number of blocks kept whatever their mass."""
        return self.sink_blocks + self.recent_blocks

    @classmethod
    def paper(cls, top_k: int = 8, **overrides: int) -> "SearchConfig":
        """The published descent as far as it is known: one probe key, no widening, no sharing, no re-rank."""
        return cls(
            strategy="descent", top_k=top_k, probe_keys=1, width=1, share_kv_group=False, rerank=False, **overrides
        )

    @classmethod
    def for_prompt(cls, **parameters: Any) -> "SearchConfig":
        """Beam, or what `parameters` say, as it is for blocks of queries (`search_prefill`)."""
        defaults: dict[str, Any] = {"strategy": "beam", "min_gain": PROMPT_MIN_GAIN, "width": PROMPT_WIDTH}
        return cls(**defaults | parameters)


@dataclass(frozen=True)
class BlockSummary:
    """Sparse attention of R rows. Masses are log-sum-exps of scaled logits (natural log), comparable across steps.

    Attributes:
        block_ids: int32 [L, R, H, K], kept inner blocks, heaviest first, `NO_BLOCK` where there are fewer.
        block_lse: float32 [L, R, H, K], exact log-sum-exp over the block's keys; -inf where padded.
        strongest: uint8 [L, R, H, K], offset in the block of the key with the largest logit.
        forced_lse: float32 [L, R, H, F], the forced blocks: sink first, then recent by ascending id; -inf where the
            context is too short to have that block (a block is listed once, as sink if it is both).
        forced_strongest: uint8 [L, R, H, F].
        unobserved_lse: float32 [L, R, H], estimated log-sum-exp of every block neither kept nor forced; -inf if none.
        learned_sink_lse: float32 [L, R, H], the logit of the head's learned sink, which takes mass without any key
            (not to be confused with the first blocks, `sink_blocks`); -inf where the layer has none.
        keys_read: float32 [L, R], key-equivalents read, per query head.
    """

    block_ids: NDArray[np.int32]
    block_lse: NDArray[np.float32]
    strongest: NDArray[np.uint8]
    forced_lse: NDArray[np.float32]
    forced_strongest: NDArray[np.uint8]
    unobserved_lse: NDArray[np.float32]
    learned_sink_lse: NDArray[np.float32]
    keys_read: NDArray[np.float32]

    @classmethod
    def allocate(cls, layers: int, rows: int, query_heads: int, config: SearchConfig) -> "BlockSummary":
        """Arrays of the shapes above, filled as if nothing had been found."""
        lead, k, f = (layers, rows, query_heads), config.top_k, config.forced_blocks
        return cls(
            block_ids=np.full((*lead, k), NO_BLOCK, np.int32),
            block_lse=np.full((*lead, k), -np.inf, np.float32),
            strongest=np.zeros((*lead, k), np.uint8),
            forced_lse=np.full((*lead, f), -np.inf, np.float32),
            forced_strongest=np.zeros((*lead, f), np.uint8),
            unobserved_lse=np.full(lead, -np.inf, np.float32),
            learned_sink_lse=np.full(lead, -np.inf, np.float32),
            keys_read=np.zeros((layers, rows), np.float32),
        )

    def first_rows(self, rows: int) -> "BlockSummary":
        """A view of the first `rows` rows."""
        return BlockSummary(**{name: array[:, :rows] for name, array in vars(self).items()})

    def total_lse(self) -> NDArray[np.float32]:
        """Logarithm of the row's softmax denominator, float32 [L, R, H]: kept + forced + unobserved + learned sink."""
        kept, forced = (np.moveaxis(lse, -1, 0) for lse in (self.block_lse, self.forced_lse))
        # Parts come first in memory too: numpy is ten times as fast over a long inner axis, and than logaddexp.reduce.
        parts = np.concatenate([kept, forced, self.unobserved_lse[None], self.learned_sink_lse[None]])
        parts = np.ascontiguousarray(parts)
        largest = parts.max(0)
        shift = np.where(np.isfinite(largest), largest, np.float32(0))
        with np.errstate(divide="ignore"):  # a row without any mass
            return np.asarray(shift + np.log(np.exp(parts - shift).sum(0)), np.float32)


def forced_block_ids(context: int, config: SearchConfig) -> list[int]:
    """Block ids in the order of `BlockSummary.forced_lse` for a row that attends to `context` keys; -1 if absent.

    >>> forced_block_ids(4096, SearchConfig())
    [0, 126, 127]
    >>> forced_block_ids(40, SearchConfig())
    [0, -1, 1]
    """
    blocks = -(-context // config.block_size)
    sink = [b if b < blocks else NO_BLOCK for b in range(config.sink_blocks)]
    recent = [b if b >= config.sink_blocks else NO_BLOCK for b in range(blocks - config.recent_blocks, blocks)]
    return sink + recent
