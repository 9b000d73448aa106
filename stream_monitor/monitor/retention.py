"""What the store lets go: requests and findings older than a limit, and the oldest ones when it grows too large."""

import logging
import time
from collections import Counter
from collections.abc import Iterable

from stream_monitor.monitor import recovery
from stream_monitor.monitor.database import Database

log = logging.getLogger(__name__)

JUMP_NS = 3600 * 10**9
"""By so much the wall clock may gain on the time that passes before its word on ages is not taken."""
REQUESTS, EVENTS, TRACE_BYTES = 100, 1000, 4 << 20
"""How many go in one transaction, and after how many bytes of traces no further one does: none takes so long that
findings wait for it. What goes is overwritten (`secure_delete`), at the pace of the disk."""

Removed = Counter[tuple[str, str]]
"""Rows that went, by record (`trace`, `event`) and reason (`age`, `size`, `deleted`)."""


class Clock:
    """Unix time by which ages are told. A wall clock that jumps ahead while the monitor runs makes nothing older: what
    it would let go is gone for good, and clocks are set wrong and set back."""

    def __init__(self) -> None:
        self._wall, self._steady = time.time_ns(), time.monotonic_ns()
        self._told = False

    def now_ns(self) -> int:
        """The wall clock's word, or the latest that can be true."""
        now, most = time.time_ns(), self._wall + time.monotonic_ns() - self._steady + JUMP_NS
        if now > most and not self._told:
            self._told = True
            log.warning(
                "store: the clock jumped ahead by %.1f hours; what is too old by that alone stays until a restart",
                (now - most + JUMP_NS) / JUMP_NS,
            )
        return min(now, most)


def let_go_some(database: Database, before_ns: int, max_bytes: int) -> Removed:
    """One transaction's part of what has to go; empty when nothing has."""
    with database.transaction():
        if removed := _let_go(database, before_ns, "age"):
            return removed
        if database.used_bytes <= max_bytes:
            return removed
        oldest = database.run(
            "SELECT max(stored_ns) FROM (SELECT stored_ns FROM requests ORDER BY stored_ns LIMIT ?)", (REQUESTS,)
        ).fetchone()[0]
        if oldest is None:
            oldest = database.run(
                "SELECT max(stored_ns) FROM (SELECT stored_ns FROM events ORDER BY sequence LIMIT ?)", (EVENTS,)
            ).fetchone()[0]
        return removed if oldest is None else _let_go(database, oldest + 1, "size")


def housekeep(database: Database, before_ns: int, now_ns: int) -> None:
    """What else goes in time: damaged files that were set aside, marks of deleted requests, the write-ahead log.

    The log is emptied here too where a reader kept a deletion from doing so.
    """
    recovery.let_go_aside(database.path, before_ns)
    database.run("DELETE FROM deleted WHERE until_ns < ?", (now_ns,))
    database.empty_log()


def _let_go(database: Database, before_ns: int, reason: str) -> Removed:
    """The oldest of what was stored before a time."""
    keys = set()
    size = 0
    for serial, key, stored_ns, own in database.run(
        "SELECT serial, key, stored_ns, length(trace) FROM requests WHERE stored_ns < ? ORDER BY stored_ns LIMIT ?",
        (before_ns, REQUESTS),
    ).fetchall():
        database.run("DELETE FROM requests WHERE serial = ?", (serial,))
        keys.add(key)
        size += own
        if size >= TRACE_BYTES:
            # The rest has its turn in the next transaction, and so have the findings of that time.
            before_ns = stored_ns + 1
            break
    removed = Removed({("trace", reason): len(keys)} if keys else {})
    # Findings go from the oldest on without a gap, so that one number says which cursors still hold.
    last = 0
    for sequence, key, stored_ns in database.run(
        "SELECT sequence, key, stored_ns FROM events ORDER BY sequence LIMIT ?", (EVENTS,)
    ):
        if stored_ns >= before_ns:
            break
        last = sequence
        keys.add(key)
        removed["event", reason] += 1
    if last:
        database.run("DELETE FROM events WHERE sequence <= ?", (last,))
        database.run("DELETE FROM losses WHERE sequence <= ?", (last,))
        database.set_meta("forgotten", last)
    forget_names(database, keys)
    return removed


def forget_names(database: Database, keys: Iterable[bytes]) -> None:
    """Forget by what ids these requests are found, where nothing of them is held any more."""
    for key in keys:
        database.run(
            "DELETE FROM names WHERE key = ?1 AND NOT EXISTS (SELECT 1 FROM requests WHERE key = ?1) "
            "AND NOT EXISTS (SELECT 1 FROM events WHERE key = ?1)",
            (key,),
        )
