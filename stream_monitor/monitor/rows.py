"""Rows of a summary -> per row, how much attention mass lies at which token position."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.lock import MIN_LAG
from stream_monitor.anchors.matrix import NO_BLOCK, forced_block_ids, sum_by_key
from stream_monitor.monitor.faults import invalid
from stream_monitor.monitor.ledger import CHUNK, TOKEN
from stream_monitor.monitor.validate import MAX_ID, MAX_POSITION
from stream_monitor.v1alpha1 import summary_pb2

MAX_ROWS = 4096
_SINK_TOKENS = 4
"""First tokens that are no far key of a loop: the attention sink is there, whatever is read."""
ROUNDING = 0.05
"""How far kept + forced + unobserved + learned sink may be from 1: float16 logarithms are off by up to 0.4% each."""


class HeadEntries(NamedTuple):
    """A row's mass, head by head: n entries.

    Attributes:
        heads: uint16 [n], places among the (layer, head) pairs of the row's sources, in their order.
        places: uint32 [n], places in the row's `keys`; once the row is folded, numbers of sentences.
        mass: float32 [n].
    """

    heads: NDArray[np.uint16]
    places: NDArray[np.uint32]
    mass: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Of the three arrays."""
        return self.heads.nbytes + self.places.nbytes + self.mass.nbytes


@dataclass(slots=True)
class Row:
    """One query token, summed (not averaged) over the layers and heads of the ranks that reported it.

    Sums of ranks add up exactly, so that two merged ranks equal one rank with all heads.

    Attributes:
        token: whether a token was sampled from it (else it ends a prefill chunk).
        keys: uint32 [n], ascending token positions of strongest keys.
        mass: float32 [n], attention mass at each, summed over heads; that of learned sinks is at none.
        unobserved: mass the search did not observe, summed over heads.
        heads: (layer, head) pairs summed.
        sources: who reported it: (rank, heads), the unit of the ledger.
        sink: mass on the first token, summed over heads: the attention sink.
        by_head: which head gave how much to which key; None once its sentence was scored.
        lag, lag_mass: tokens back to the key at least `MIN_LAG` back that got most mass, the first tokens aside, and
            that mass; 0 if there is none. Of two ranks' shares of a row the heavier one's.
    """

    request_id: str
    position: int
    attempt: int
    token: bool
    keys: NDArray[np.uint32]
    mass: NDArray[np.float32]
    unobserved: float
    heads: int
    sources: tuple[tuple[Any, int], ...]
    sink: float = 0.0
    lag: int = 0
    lag_mass: float = 0.0
    by_head: HeadEntries | None = None

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        return self.keys.nbytes + self.mass.nbytes + (self.by_head.nbytes if self.by_head else 0)

    def shares_source(self, other: "Row") -> bool:
        """Whether one rank reported both, so that they are one row sent twice and not two parts of a row."""
        return not {id(rank) for rank, _ in self.sources}.isdisjoint(id(rank) for rank, _ in other.sources)

    def joined(self, other: "Row") -> "Row":
        """This row with another rank's share of it added."""
        both = np.concatenate([self.keys, other.keys]).astype(np.int64)[None]
        both_mass = np.concatenate([self.mass, other.mass]).astype(np.float64)[None]
        keys, mass, _, places = sum_by_key(both, both_mass, np.ones(both.shape, bool))
        by_head = None
        if self.by_head and other.by_head:
            ours, theirs = self.by_head, other.by_head
            by_head = HeadEntries(
                np.concatenate([ours.heads, theirs.heads + np.uint16(self.heads)]),
                places[np.concatenate([ours.places, theirs.places + len(self.keys)])].astype(np.uint32),
                np.concatenate([ours.mass, theirs.mass]),
            )
        return Row(
            self.request_id,
            self.position,
            self.attempt,
            self.token,
            keys.astype(np.uint32),
            mass,
            self.unobserved + other.unobserved,
            self.heads + other.heads,
            self.sources + other.sources,
            self.sink + other.sink,
            *max((self.lag, self.lag_mass), (other.lag, other.lag_mass), key=lambda far: far[1]),
            by_head,
        )


def decode(rows: summary_pb2.Rows, engine: summary_pb2.EngineInfo, sources: tuple[tuple[Any, int], ...]) -> list[Row]:
    """Check the arrays of one rank against their stated shapes and sum them by key. Raises Fault."""
    count = rows.count
    if count > MAX_ROWS:
        raise invalid("limit", f"rows.count is {count}; at most {MAX_ROWS}")
    if len(rows.request_ids) != count:
        raise invalid("shape", f"rows.request_ids has {len(rows.request_ids)} entries for count {count}")
    if not all(0 < len(request_id) <= MAX_ID for request_id in rows.request_ids):
        raise invalid("value", f"rows.request_ids must have 1 to {MAX_ID} characters each")
    geometry = engine.geometry
    lead = (count, len(engine.layers), len(engine.query_heads))
    kept, forced = (*lead, geometry.top_k), (*lead, geometry.sink_blocks + geometry.recent_blocks)

    positions = _array(rows, "positions", "<u4", (count,)).astype(np.int64)
    attempts = _array(rows, "attempts", "<u4", (count,))
    phases = _array(rows, "phases", "u1", (count,))
    ids = _array(rows, "block_ids", "<u4", kept).astype(np.int64)
    log_share = _array(rows, "block_log_share", "<f2", kept)
    strongest = _array(rows, "block_strongest", "u1", kept)
    forced_log_share = _array(rows, "forced_log_share", "<f2", forced)
    forced_strongest = _array(rows, "forced_strongest", "u1", forced)
    unobserved = _array(rows, "unobserved_log_share", "<f2", lead)
    total = _array(rows, "total_lse", "<f4", lead)
    keys_read = _array(rows, "keys_read", "<f4", lead[:2])
    sinks = _array(rows, "learned_sink_log_share", "<f2", lead) if rows.learned_sink_log_share else None

    if count and positions.max() >= MAX_POSITION:
        raise invalid("limit", f"rows.positions reach {positions.max()}; below {MAX_POSITION}")
    if not np.isin(phases, summary_pb2.Phase.values()[1:]).all():
        raise invalid("value", "rows.phases has an unknown Phase")
    if not np.isfinite(total).all() or not np.isfinite(keys_read).all() or (keys_read < 0).any():
        raise invalid("value", "rows.total_lse and rows.keys_read must be finite, keys_read not negative")

    forced_ids = np.broadcast_to(
        forced_block_ids(positions, geometry.block_size, geometry.sink_blocks, geometry.recent_blocks)[:, None, None],
        forced,
    )
    shares = np.concatenate([_share(log_share, "block"), _share(forced_log_share, "forced")], axis=-1)
    blocks = np.concatenate([np.where(ids == NO_BLOCK, -1, ids), forced_ids], axis=-1)
    offsets = np.concatenate([strongest, forced_strongest], axis=-1)
    rest = _share(unobserved, "unobserved")
    keys = blocks * geometry.block_size + offsets
    used = shares > 0
    wrong = (blocks < 0) | (offsets >= geometry.block_size) | (keys > positions[:, None, None, None])
    if (used & wrong).any():
        raise invalid("value", "rows: a block with mass, or its strongest key, lies outside the row's context")
    # A learned sink stands for no token: its share is accounted for here and belongs to nothing after.
    without_key = rest if sinks is None else rest + _share(sinks, "learned_sink")
    if (abs(shares.sum(axis=-1) + without_key - 1.0) > ROUNDING).any():
        raise invalid("value", "rows: kept, forced, unobserved and learned sink shares do not sum to 1")
    flat = count, math.prod(kept[1:]) + math.prod(forced[1:])
    joined = sum_by_key(keys.reshape(flat), shares.reshape(flat), used.reshape(flat))
    edges = joined.edges
    # Of each row: where its far keys begin and end, looked up with the row number above the bits of the position.
    begins = np.arange(count) * MAX_POSITION
    combined = joined.keys + np.repeat(begins, np.diff(edges))
    far = np.searchsorted(combined, begins + _SINK_TOKENS)
    near = np.searchsorted(combined, begins + np.maximum(positions - MIN_LAG + 1, 0))
    heads = np.arange(lead[1] * lead[2], dtype=np.uint16).reshape(lead[1], lead[2], 1)
    heads_used = np.broadcast_to(heads, keys.shape)[used]
    key_places = joined.places.astype(np.uint32)
    mass_used = shares[used].astype(np.float32)
    ends = np.concatenate([[0], np.cumsum(used.sum(axis=(1, 2, 3)))])
    distinct = joined.keys.astype(np.uint32)
    of_row = (
        rows.request_ids,
        positions.tolist(),
        attempts.tolist(),
        (phases != summary_pb2.PHASE_PREFILL_CHUNK).tolist(),
        rest.sum(axis=(1, 2)).tolist(),
        pairwise(edges.tolist()),
        pairwise(ends.tolist()),
        zip((far - edges[:-1]).tolist(), (near - edges[:-1]).tolist(), strict=True),
    )
    return [
        _with_landmarks(
            Row(
                request_id,
                position,
                attempt,
                token,
                # Copies: a view would keep the arrays of all rows for as long as one of them waits.
                distinct[low:high].copy(),
                joined.mass[low:high].copy(),
                unobserved_mass,
                lead[1] * lead[2],
                sources,
                by_head=HeadEntries(
                    heads_used[first:end].copy(), key_places[first:end].copy(), mass_used[first:end].copy()
                ),
            ),
            *far_keys,
        )
        for request_id, position, attempt, token, unobserved_mass, (low, high), (first, end), far_keys in zip(
            *of_row, strict=True
        )
    ]


def _with_landmarks(row: Row, first: int, end: int) -> Row:
    """The same with `sink`, `lag` and `lag_mass`, from its keys, of which first .. end - 1 are far ones."""
    if len(row.keys) and row.keys[0] == 0:
        row.sink = float(row.mass[0])
    if end > first:
        heaviest = first + int(row.mass[first:end].argmax())
        row.lag, row.lag_mass = row.position - int(row.keys[heaviest]), float(row.mass[heaviest])
    return row


def discard(row: Row, reason: str) -> None:
    """Count a row as taken in and thrown away, with every rank that reported it."""
    for rank, heads in row.sources:
        rank.ledger.discard(TOKEN if row.token else CHUNK, reason, heads)


def check_audits(audits: Iterable[summary_pb2.Audit]) -> None:
    """Raise a Fault unless every audit holds numbers that can be averaged."""
    for audit in audits:
        if not (0.0 <= audit.recall <= 1.0 + ROUNDING and math.isfinite(audit.unobserved_error)):
            raise invalid("value", "audits: recall must be in [0, 1] and unobserved_error finite")


def _array(rows: summary_pb2.Rows, name: str, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    raw: bytes = getattr(rows, name)
    expected = math.prod(shape) * np.dtype(kind).itemsize
    if len(raw) != expected:
        raise invalid("shape", f"rows.{name} has {len(raw)} bytes; shape {list(shape)} of {kind} has {expected}")
    return np.frombuffer(raw, kind).reshape(shape)


def _share(log_share: NDArray[np.float16], name: str) -> NDArray[np.float64]:
    """Natural log share -> share; NaN and shares above 1 are refused."""
    if np.isnan(log_share).any() or (log_share > ROUNDING).any():
        raise invalid("value", f"rows.{name}_log_share must be at most 0 and not NaN")
    return np.exp(log_share.astype(np.float64))
