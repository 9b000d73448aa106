"""Rows of a summary -> per row, how much attention mass lies at which token position."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.matrix import NO_BLOCK, forced_block_ids
from stream_monitor.compiled.decoding import OUTSIDE, UNSOUND, decode_rows, heaviest_far_keys
from stream_monitor.compiled.periods import FAR_KEYS, MOST_LAG
from stream_monitor.monitor.faults import Fault, invalid
from stream_monitor.monitor.ledger import CHUNK, TOKEN
from stream_monitor.monitor.validate import MAX_ID, MAX_POSITION
from stream_monitor.v1alpha1 import summary_pb2

MAX_ROWS = 4096
ROUNDING = 0.05
"""How far kept + forced + unobserved + learned sink may be from 1: float16 logarithms are off by up to 0.4% each."""
_NO_NARROW_BLOCK = 0xFFFF
FAR_KEY = np.dtype([("lag", "<u4"), ("mass", "<f4")])
"""Tokens back from a row to a key, and its mass summed over heads; no mass where there is none."""
_NO_FAR_KEYS = bytes(FAR_KEYS * FAR_KEY.itemsize)


@dataclass(slots=True)
class Row:
    """One query token over the layers and heads of the ranks that reported it.

    Masses are sums (not averages) over heads, so that two merged ranks equal one rank with all heads.

    Attributes:
        token: whether a token was sampled from it (else it ends a prefill chunk).
        keys: uint32 [n], token position of each strongest key: of every (layer, head) of each source in turn, its kept
            and forced blocks. 0 where the block holds nothing.
        mass: float32 [n], attention mass at each; that of learned sinks is at none.
        unobserved: mass the search did not observe, summed over heads.
        heads: (layer, head) pairs summed.
        sources: who reported it: (rank, heads), the unit of the ledger.
        far_keys: `FAR_KEY` [FAR_KEYS] as bytes, which take a third of an array's memory: the keys `LEAST_LAG` to
            `MOST_LAG` back that got most mass, the first tokens aside. Of two ranks' shares of a row, among the
            heaviest of each.
        by_head: whether keys and mass stand as said; else they were summed over heads before.
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
    far_keys: bytes = _NO_FAR_KEYS
    by_head: bool = True

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        return self.keys.nbytes + self.mass.nbytes

    def shares_source(self, other: "Row") -> bool:
        """Whether one rank reported both, so that they are one row sent twice and not two parts of a row."""
        return not {id(rank) for rank, _ in self.sources}.isdisjoint(id(rank) for rank, _ in other.sources)

    def joined(self, other: "Row") -> "Row":
        """This row with another rank's share of it added."""
        return Row(
            self.request_id,
            self.position,
            self.attempt,
            self.token,
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.mass, other.mass]),
            self.unobserved + other.unobserved,
            self.heads + other.heads,
            self.sources + other.sources,
            _heaviest_of_both(self.far_keys, other.far_keys),
            self.by_head and other.by_head,
        )


def decode(rows: summary_pb2.Rows, engine: summary_pb2.EngineInfo, sources: tuple[tuple[Any, int], ...]) -> list[Row]:
    """Check the arrays of one rank's message against their stated shapes and turn blocks into keys. Raises Fault."""
    if rows.count > MAX_ROWS:
        raise invalid("limit", f"rows.count is {rows.count}; at most {MAX_ROWS}")
    if len(rows.request_ids) != rows.count:
        raise invalid("shape", f"rows.request_ids has {len(rows.request_ids)} entries for count {rows.count}")
    if not all(0 < len(request_id) <= MAX_ID for request_id in rows.request_ids):
        raise invalid("value", f"rows.request_ids must have 1 to {MAX_ID} characters each")
    count = rows.count
    geometry = engine.geometry
    size, top_k = geometry.block_size, geometry.top_k
    pairs = len(engine.layers), len(engine.query_heads)
    forced_blocks = geometry.sink_blocks + geometry.recent_blocks

    positions = _array(rows, "positions", "<u4", ()).astype(np.int64)
    attempts = _array(rows, "attempts", "<u4", ())
    phases = _array(rows, "phases", "u1", ())
    ids = _block_ids(rows, (*pairs, top_k))
    log_share = _logarithms(rows, "block_log_share", (*pairs, top_k))
    strongest = _array(rows, "block_strongest", "u1", (*pairs, top_k))
    forced_log_share = _logarithms(rows, "forced_log_share", (*pairs, forced_blocks))
    forced_strongest = _array(rows, "forced_strongest", "u1", (*pairs, forced_blocks))
    unobserved = _logarithms(rows, "unobserved_log_share", pairs)
    total = _array(rows, "total_lse", "<f4", pairs)
    keys_read = _array(rows, "keys_read", "<f4", pairs[:1])
    sinks = _logarithms(rows, "learned_sink_log_share", pairs, optional=True)

    if count and positions.max() >= MAX_POSITION:
        raise invalid("limit", f"rows.positions reach {positions.max()}; below {MAX_POSITION}")
    if not _KNOWN_PHASE[phases].all():
        raise invalid("value", "rows.phases has an unknown Phase")
    if not (np.isfinite(total).all() and np.isfinite(keys_read).all() and (keys_read >= 0).all()):
        raise invalid("value", "rows.total_lse and rows.keys_read must be finite, keys_read not negative")

    heads, blocks = math.prod(pairs), top_k + forced_blocks
    keys, mass = np.empty((count, heads * blocks), np.uint32), np.empty((count, heads * blocks), np.float32)
    rest = np.empty(count)
    kept, forced = (count, heads, top_k), (count, heads, forced_blocks)
    found = decode_rows(
        positions,
        size,
        ids.reshape(kept),
        strongest.reshape(kept),
        log_share.reshape(kept),
        forced_block_ids(positions, size, geometry.sink_blocks, geometry.recent_blocks),
        forced_strongest.reshape(forced),
        forced_log_share.reshape(forced),
        unobserved.reshape(kept[:2]),
        sinks.reshape(kept[:2]),
        _SHARES,
        ROUNDING,
        keys,
        mass,
        rest,
    )
    if found == OUTSIDE:
        raise invalid("value", "rows: a block with mass, or its strongest key, lies outside the row's context")
    if found == UNSOUND:
        raise _unsound(block=log_share, forced=forced_log_share, unobserved=unobserved, learned_sink=sinks)

    of_row = zip(
        rows.request_ids,
        positions.tolist(),
        attempts.tolist(),
        (phases != summary_pb2.PHASE_PREFILL_CHUNK).tolist(),
        keys,
        mass,
        rest.tolist(),
        _far_keys(keys, mass, positions),
        strict=True,
    )
    return [
        Row(
            request_id,
            position,
            attempt,
            token,
            # Copies: a view would keep the arrays of all rows for as long as one of them waits.
            row_keys.copy(),
            row_mass.copy(),
            unobserved_mass,
            heads,
            sources,
            far_keys,
        )
        for request_id, position, attempt, token, row_keys, row_mass, unobserved_mass, far_keys in of_row
    ]


def _far_keys(keys: NDArray[np.uint32], mass: NDArray[np.float32], positions: NDArray[np.int64]) -> list[bytes]:
    """Each row's `far_keys`, see `Row`.

    Args:
        keys, mass: [rows, n].
        positions: [rows].
    """
    lags, masses = (np.empty((len(keys), FAR_KEYS), FAR_KEY[name]) for name in ("lag", "mass"))
    heaviest_far_keys(keys, mass, positions, lags, masses)
    found = np.empty(lags.shape, FAR_KEY)
    found["lag"], found["mass"] = lags, masses
    return [row.tobytes() for row in found]


def _heaviest_of_both(one: bytes, other: bytes) -> bytes:
    """Of two ranks' far keys of a row."""
    both = np.frombuffer(one + other, FAR_KEY)[None]
    # As far away from the first token as no lag reaches.
    position = 2 * MOST_LAG
    (joined,) = _far_keys(position - both["lag"], np.ascontiguousarray(both["mass"]), np.array([position]))
    return joined


def discard(row: Row, reason: str) -> None:
    """Count a row as taken in and thrown away, with every rank that reported it."""
    for rank, heads in row.sources:
        rank.ledger.discard(TOKEN if row.token else CHUNK, reason, heads)


def check_audits(audits: Iterable[summary_pb2.Audit]) -> None:
    """Raise a Fault unless every audit holds numbers that can be averaged."""
    for audit in audits:
        if not (0.0 <= audit.recall <= 1.0 + ROUNDING and math.isfinite(audit.unobserved_error)):
            raise invalid("value", "audits: recall must be in [0, 1] and unobserved_error finite")


def _array(
    rows: summary_pb2.Rows, name: str, kind: str, shape: tuple[int, ...], optional: bool = False
) -> NDArray[Any]:
    """One array of the rows; -inf where `optional` and absent."""
    raw: bytes = getattr(rows, name)
    size = math.prod((rows.count, *shape))
    if optional and not raw:
        raw = np.full(size, -np.inf, kind).tobytes()
    if len(raw) != size * int(kind[-1]):
        wanted = f"shape {[rows.count, *shape]} of {kind} has {size * int(kind[-1])}"
        raise invalid("shape", f"rows.{name} has {len(raw)} bytes; {wanted}")
    return np.frombuffer(raw, kind).reshape(rows.count, *shape)


def _logarithms(
    rows: summary_pb2.Rows, name: str, shape: tuple[int, ...], optional: bool = False
) -> NDArray[np.uint16]:
    """The bits of an array of float16; those of -inf where `optional` and absent."""
    return _array(rows, name, "<f2", shape, optional).view(np.uint16)


def _block_ids(rows: summary_pb2.Rows, shape: tuple[int, ...]) -> NDArray[np.uint32]:
    """Kept blocks, in whichever width they came; `NO_BLOCK` where there is none."""
    if not rows.narrow_block_ids:
        return _array(rows, "block_ids", "<u4", shape).copy()
    if rows.block_ids:
        raise invalid("shape", "rows.block_ids and rows.narrow_block_ids are both there; send one of them")
    ids = _array(rows, "narrow_block_ids", "<u2", shape)
    wide = ids.astype(np.uint32)
    wide[ids == _NO_NARROW_BLOCK] = NO_BLOCK
    return wide


def _unsound(**log_shares: NDArray[np.uint16]) -> Fault:
    """What is wrong with shares that do not add up."""
    for name, log_share in log_shares.items():
        if np.isnan(_SHARES[log_share]).any():
            return invalid("value", f"rows.{name}_log_share must be at most 0 and not NaN")
    return invalid("value", "rows: kept, forced, unobserved and learned sink shares do not sum to 1")


def _share_table() -> NDArray[np.float32]:
    """The share of each float16, which is looked up faster than computed: NaN for NaN and for shares above 1, which
    the sum over the row shows."""
    logs = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    sound = logs <= ROUNDING
    shares = np.full(len(logs), np.nan, np.float32)
    # Of those alone: on some processors numpy warns of what is no number.
    shares[sound] = np.exp(logs[sound].astype(np.float64))
    return shares


_SHARES = _share_table()
_KNOWN_PHASE = np.isin(np.arange(256), summary_pb2.Phase.values()[1:])
