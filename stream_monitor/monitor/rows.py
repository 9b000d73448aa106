"""Rows of a summary -> per row, how much attention mass lies at which token position."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.lock import FAR_KEYS, LEAST_LAG, MOST_LAG
from stream_monitor.anchors.matrix import NO_BLOCK, forced_block_ids
from stream_monitor.monitor.faults import Fault, invalid
from stream_monitor.monitor.ledger import CHUNK, TOKEN
from stream_monitor.monitor.validate import MAX_ID, MAX_POSITION
from stream_monitor.v1alpha1 import summary_pb2

MAX_ROWS = 4096
_SINK_TOKENS = 4
"""First tokens that are no far key of a loop: the attention sink is there, whatever is read."""
ROUNDING = 0.05
"""How far kept + forced + unobserved + learned sink may be from 1: float16 logarithms are off by up to 0.4% each."""
_NO_NARROW_BLOCK = 0xFFFF
FAR_KEY = np.dtype([("lag", "<u4"), ("mass", "<f4")])
"""Tokens back from a row to a key, and its mass summed over heads; no mass where there is none."""
_NO_FAR_KEYS = bytes(FAR_KEYS * FAR_KEY.itemsize)
_TABLE = 1 << 16
"""Cells of a table of rows and lags, which stays in the processor's caches."""


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


def decode(
    messages: Sequence[summary_pb2.Rows], engine: summary_pb2.EngineInfo, sources: tuple[tuple[Any, int], ...]
) -> list[list[Row]]:
    """Check the arrays of one rank's messages against their stated shapes and turn blocks into keys. Raises Fault."""
    if not messages:
        return []
    counts = [rows.count for rows in messages]
    for rows in messages:
        if rows.count > MAX_ROWS:
            raise invalid("limit", f"rows.count is {rows.count}; at most {MAX_ROWS}")
        if len(rows.request_ids) != rows.count:
            raise invalid("shape", f"rows.request_ids has {len(rows.request_ids)} entries for count {rows.count}")
        if not all(0 < len(request_id) <= MAX_ID for request_id in rows.request_ids):
            raise invalid("value", f"rows.request_ids must have 1 to {MAX_ID} characters each")
    count = sum(counts)
    geometry = engine.geometry
    size, top_k = geometry.block_size, geometry.top_k
    pairs = len(engine.layers), len(engine.query_heads)
    forced_blocks = geometry.sink_blocks + geometry.recent_blocks

    positions = _array(messages, "positions", "<u4", ()).astype(np.int64)
    attempts = _array(messages, "attempts", "<u4", ())
    phases = _array(messages, "phases", "u1", ())
    ids = _block_ids(messages, (*pairs, top_k))
    log_share = _array(messages, "block_log_share", "<f2", (*pairs, top_k))
    strongest = _array(messages, "block_strongest", "u1", (*pairs, top_k))
    forced_log_share = _array(messages, "forced_log_share", "<f2", (*pairs, forced_blocks))
    forced_strongest = _array(messages, "forced_strongest", "u1", (*pairs, forced_blocks))
    unobserved = _array(messages, "unobserved_log_share", "<f2", pairs)
    total = _array(messages, "total_lse", "<f4", pairs)
    keys_read = _array(messages, "keys_read", "<f4", pairs[:1])
    sinks = None
    if any(rows.learned_sink_log_share for rows in messages):
        sinks = _array(messages, "learned_sink_log_share", "<f2", pairs, optional=True)

    if count and positions.max() >= MAX_POSITION:
        raise invalid("limit", f"rows.positions reach {positions.max()}; below {MAX_POSITION}")
    if not _KNOWN_PHASE[phases].all():
        raise invalid("value", "rows.phases has an unknown Phase")
    if not (np.isfinite(total).all() and np.isfinite(keys_read).all() and (keys_read >= 0).all()):
        raise invalid("value", "rows.total_lse and rows.keys_read must be finite, keys_read not negative")

    blocks = top_k + forced_blocks
    mass = np.empty((count, *pairs, blocks), np.float32)
    mass[..., :top_k], mass[..., top_k:] = _share(log_share), _share(forced_log_share)
    keys = np.empty((count, *pairs, blocks), np.uint32)
    # What no block number of a context can be stays above every position, and does not wrap around.
    np.minimum(ids, MAX_POSITION // size, out=keys[..., :top_k])
    forced_ids = forced_block_ids(positions, size, geometry.sink_blocks, geometry.recent_blocks)
    keys[..., top_k:] = np.where(forced_ids < 0, MAX_POSITION // size, forced_ids)[:, None, None]
    keys *= np.uint32(size)
    keys[..., :top_k] += strongest
    keys[..., top_k:] += forced_strongest
    used = mass > 0
    wrong = keys > positions[:, None, None, None].astype(np.uint32)
    if max(strongest.max(initial=0), forced_strongest.max(initial=0)) >= size:
        wrong |= np.concatenate([strongest, forced_strongest], axis=-1) >= size
    if (used & wrong).any():
        raise invalid("value", "rows: a block with mass, or its strongest key, lies outside the row's context")
    keys *= used
    # A learned sink stands for no token: its share is accounted for here and belongs to nothing after.
    rest = _share(unobserved)
    accounted = mass @ np.ones(blocks, np.float32) + rest
    if sinks is not None:
        accounted += _share(sinks)
    if not (abs(accounted - 1.0) <= ROUNDING).all():
        raise _unsound(block=log_share, forced=forced_log_share, unobserved=unobserved, learned_sink=sinks)

    heads = math.prod(pairs)
    flat = count, heads * blocks
    keys, mass = keys.reshape(flat), mass.reshape(flat)
    of_row = zip(
        chain.from_iterable(rows.request_ids for rows in messages),
        positions.tolist(),
        attempts.tolist(),
        (phases != summary_pb2.PHASE_PREFILL_CHUNK).tolist(),
        keys,
        mass,
        rest.sum(axis=(1, 2)).tolist(),
        _far_keys(keys, mass, positions),
        strict=True,
    )
    decoded = (
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
    )
    return [list(islice(decoded, number)) for number in counts]


def _far_keys(keys: NDArray[np.uint32], mass: NDArray[np.float32], positions: NDArray[np.int64]) -> list[bytes]:
    """Each row's `far_keys`, see `Row`.

    Args:
        keys, mass: [rows, n].
        positions: [rows].
    """
    together = max(1, _TABLE // max(MOST_LAG + 1, keys.shape[1]))
    found: list[bytes] = []
    for first in range(0, len(keys), together):
        some = slice(first, first + together)
        lags = positions[some].astype(np.uint32)[:, None] - keys[some]
        far = (lags >= LEAST_LAG) & (lags <= MOST_LAG) & (keys[some] >= _SINK_TOKENS)
        found += _heaviest(lags * far, mass[some] * far)
    return found


def _heaviest(lags: NDArray[np.integer], mass: NDArray[np.floating]) -> list[bytes]:
    """The lags of each row [rows, n] with most mass, `FAR_KEY` [FAR_KEYS], heaviest first; lag 0 has none."""
    count, span = len(lags), MOST_LAG + 1
    rows = np.arange(count)
    places = lags + span * rows[:, None]
    sums = np.bincount(places.ravel(), mass.ravel(), count * span).reshape(count, span)
    heaviest = np.empty((count, FAR_KEYS), FAR_KEY)
    # So few are faster taken one by one than by a partition.
    for place in range(FAR_KEYS):
        lag = sums.argmax(axis=1)
        heaviest["lag"][:, place], heaviest["mass"][:, place] = lag, sums[rows, lag]
        sums[rows, lag] = 0.0
    return [row.tobytes() for row in heaviest]


def _heaviest_of_both(one: bytes, other: bytes) -> bytes:
    """Of two ranks' far keys of a row."""
    both = np.frombuffer(one + other, FAR_KEY)
    lags, place = np.unique(both["lag"], return_inverse=True)
    (joined,) = _heaviest(lags[None], np.bincount(place, both["mass"]).astype(float, copy=False)[None])
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
    messages: Sequence[summary_pb2.Rows], name: str, kind: str, shape: tuple[int, ...], optional: bool = False
) -> NDArray[Any]:
    """One array of the rows of all messages; -inf where `optional` and absent."""
    parts: list[bytes] = []
    for rows in messages:
        raw: bytes = getattr(rows, name)
        size = math.prod((rows.count, *shape))
        if optional and not raw:
            raw = np.full(size, -np.inf, kind).tobytes()
        if len(raw) != size * int(kind[-1]):
            wanted = f"shape {[rows.count, *shape]} of {kind} has {size * int(kind[-1])}"
            raise invalid("shape", f"rows.{name} has {len(raw)} bytes; {wanted}")
        parts.append(raw)
    return np.frombuffer(b"".join(parts), kind).reshape(sum(rows.count for rows in messages), *shape)


def _block_ids(messages: Sequence[summary_pb2.Rows], shape: tuple[int, ...]) -> NDArray[np.uint32]:
    """Kept blocks of the rows of all messages, in whichever width they came; `NO_BLOCK` where there is none."""
    parts: list[NDArray[np.uint32]] = []
    for narrow, together in groupby(messages, lambda rows: bool(rows.narrow_block_ids)):
        alike = list(together)
        if not narrow:
            parts.append(_array(alike, "block_ids", "<u4", shape))
            continue
        if any(rows.block_ids for rows in alike):
            raise invalid("shape", "rows.block_ids and rows.narrow_block_ids are both there; send one of them")
        ids = _array(alike, "narrow_block_ids", "<u2", shape)
        wide = ids.astype(np.uint32)
        wide[ids == _NO_NARROW_BLOCK] = NO_BLOCK
        parts.append(wide)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _share(log_share: NDArray[np.float16]) -> NDArray[np.float32]:
    """Natural log share -> share; NaN for NaN and for shares above 1, which the sum over the row then shows."""
    return _SHARES[log_share.view(np.uint16)]


def _unsound(**log_shares: NDArray[np.float16] | None) -> Fault:
    """What is wrong with shares that do not add up."""
    for name, log_share in log_shares.items():
        if log_share is not None and np.isnan(_share(log_share)).any():
            return invalid("value", f"rows.{name}_log_share must be at most 0 and not NaN")
    return invalid("value", "rows: kept, forced, unobserved and learned sink shares do not sum to 1")


def _share_table() -> NDArray[np.float32]:
    """The share of each of the 65,536 float16: looked up faster than computed."""
    logs = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    sound = logs <= ROUNDING
    shares = np.full(len(logs), np.nan, np.float32)
    # Of those alone: on some processors numpy warns of what is no number.
    shares[sound] = np.exp(logs[sound].astype(np.float64))
    return shares


_SHARES = _share_table()
_KNOWN_PHASE = np.isin(np.arange(256), summary_pb2.Phase.values()[1:])
