"""What the store holds, row by row. Everything here blocks; who calls it keeps it off the event loop.

A row holds a serialized message of `monitor.proto` and what it is found by. Ids stand in those messages alone: indexes
hold salted hashes, so that a request that is deleted leaves no id behind in them.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from isal import isal_zlib

from stream_monitor.monitor.database_file import PUBLIC, DatabaseFile
from stream_monitor.monitor.identity import EXACT, TraceKey, names
from stream_monitor.v1alpha1 import monitor_pb2

_LEVEL = 2
"""Traces are mostly small numbers in wide arrays."""

Listed = tuple[int, monitor_pb2.RequestInfo]
"""A request's place in the list, which ascends with the time it began, and what is listed."""


@dataclass(frozen=True, slots=True)
class StoredTrace:
    """One request: `info` is a RequestInfo, `trace` a GetTraceResponse without it, both serialized."""

    instance: str
    request_id: str
    serial: int
    state: int
    model_name: str
    engine: str
    info: bytes
    trace: bytes

    @property
    def size(self) -> int:
        """Bytes, about."""
        return len(self.info) + len(self.trace) + 512

    def whole(self) -> monitor_pb2.GetTraceResponse:
        """As one message."""
        found = monitor_pb2.GetTraceResponse.FromString(self.trace)
        found.info.CopyFrom(_info(self.info, self.state))
        return found


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One finding, serialized, with its place in the event log."""

    sequence: int
    instance: str
    request_id: str
    event: bytes


@dataclass(frozen=True, slots=True)
class EventPage:
    """Findings in order, each with how many before it are lost; `last` is the sequence the page ends at, `lost` what is
    lost between the last finding and there."""

    events: list[tuple[int, monitor_pb2.Event, int]]
    last: int
    lost: int = 0


def packed(raw: bytes) -> bytes:
    """A serialized trace in zlib's format (RFC 1950), which zlib itself takes six times as long to write."""
    found: bytes = isal_zlib.compress(raw, _LEVEL)
    return found


class Database(DatabaseFile):
    """The rows of the file, over one connection. Several may be open: one writes, others read."""

    # Writing: inside a transaction.

    def add_events(self, events: Iterable[StoredEvent], now_ns: int) -> None:
        """Findings, in ascending sequence."""
        for event in events:
            key = self._named(event.instance, event.request_id)
            self.run("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?)", (event.sequence, key, now_ns, event.event))
            self.set_meta("newest", event.sequence)

    def add_loss(self, sequence: int, count: int) -> None:
        """`count` findings before `sequence` could not be stored."""
        self.run("INSERT OR REPLACE INTO losses VALUES (?, ?)", (sequence, count))

    def put_traces(self, traces: Iterable[StoredTrace], now_ns: int) -> None:
        """Requests; what was stored of them before is replaced."""
        for trace in traces:
            key = self._named(trace.instance, trace.request_id)
            columns = (trace.serial, key, now_ns, trace.state, trace.model_name, trace.engine)
            self.run("DELETE FROM requests WHERE key = ?", (key,))
            self.run(
                "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*columns, trace.info, packed(trace.trace)),
            )

    def bury(self, dead: dict[bytes, int]) -> None:
        """Mark requests as deleted, by key, until a time."""
        self._connection.executemany("INSERT OR REPLACE INTO deleted VALUES (?, ?)", dead.items())

    def _named(self, instance: str, request_id: str) -> bytes:
        """The key of a request, which is found by all its ids from now on."""
        key = self.keys.trace(instance, request_id)
        # By the name that a fleet's stream has for it too.
        known = names(request_id) | {PUBLIC.trace(instance, request_id).hex(): EXACT}
        found = ((self.keys.name(name), key, fit) for name, fit in known.items())
        self._connection.executemany("INSERT OR IGNORE INTO names VALUES (?, ?, ?)", found)
        return key

    def cut_running(self) -> None:
        """What an earlier monitor left running will not go on under it."""
        self.run(
            "UPDATE requests SET state = ? WHERE state = ?",
            (monitor_pb2.REQUEST_STATE_CUT, monitor_pb2.REQUEST_STATE_RUNNING),
        )

    # Reading.

    def tombstones(self) -> dict[bytes, int]:
        """Keys of requests that were deleted, and until when what comes of them is thrown away."""
        return dict(self.run("SELECT key, until_ns FROM deleted").fetchall())

    def newest_serial(self) -> int:
        """Of all requests held; 0 if there are none."""
        return int(self.run("SELECT max(serial) FROM requests").fetchone()[0] or 0)

    def events_after(self, sequence: int, limit: int) -> EventPage:
        """The next findings after a sequence."""
        with self.snapshot():
            rows = self.run(
                "SELECT sequence, event FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?", (sequence, limit)
            ).fetchall()
            last = rows[-1][0] if len(rows) == limit else max(self.meta("newest"), sequence)
            losses = self.run(
                "SELECT sequence, count FROM losses WHERE sequence > ? AND sequence <= ? ORDER BY sequence",
                (sequence, last),
            ).fetchall()
        found = []
        for number, raw in rows:
            lost = 0
            while losses and losses[0][0] <= number:
                lost += losses.pop(0)[1]
            found.append((number, monitor_pb2.Event.FromString(raw), lost))
        return EventPage(found, last)

    def event(self, sequence: int) -> monitor_pb2.Event | None:
        """One finding."""
        row = self.run("SELECT event FROM events WHERE sequence = ?", (sequence,)).fetchone()
        return None if row is None else monitor_pb2.Event.FromString(row[0])

    def newest_events(self, limit: int) -> list[tuple[int, monitor_pb2.Event]]:
        """The newest findings, oldest first, none of them lost in between."""
        rows = self.run(
            "SELECT sequence, event FROM events WHERE sequence >= (SELECT coalesce(max(sequence), 0) FROM losses) "
            "ORDER BY sequence DESC LIMIT ?",
            (limit,),
        ).fetchall()
        return [(sequence, monitor_pb2.Event.FromString(raw)) for sequence, raw in reversed(rows)]

    def find(self, name: str) -> list[tuple[TraceKey, int, str]]:
        """Requests with a trace or findings that an id may mean, newest first, how well it fits, and their tenants."""
        rows = self.run(
            "SELECT key, fit, info FROM names LEFT JOIN requests USING (key) WHERE name = ? ORDER BY serial DESC",
            (self.keys.name(name),),
        ).fetchall()
        found = [(self._known(key, info), fit) for key, fit, info in rows]
        return [((known.key.engine_instance, known.key.request_id), fit, known.tenant) for known, fit in found]

    def _known(self, key: bytes, info: bytes | None) -> monitor_pb2.RequestInfo | monitor_pb2.Event:
        """What names a request and its tenant."""
        if info is not None:
            return monitor_pb2.RequestInfo.FromString(info)
        # Its trace is not held any more, its findings are.
        raw = self.run("SELECT event FROM events WHERE key = ?", (key,)).fetchone()[0]
        return monitor_pb2.Event.FromString(raw)

    def infos(self, before: int, limit: int, model_name: str, engine: str, name: str, fit: int) -> list[Listed]:
        """Requests with a serial below `before`, newest first; empty filters match all, `fit` goes with `name`."""
        where = ["serial < ?1"]
        if model_name:
            where.append("model_name = ?2")
        if engine:
            where.append("engine = ?3")
        if name:
            where.append("key IN (SELECT key FROM names WHERE name = ?4 AND fit = ?5)")
        rows = self.run(
            f"SELECT serial, state, info FROM requests WHERE {' AND '.join(where)} ORDER BY serial DESC LIMIT ?6",
            (before, model_name, engine, self.keys.name(name), fit, limit),
        )
        return [(serial, _info(raw, state)) for serial, state, raw in rows]

    def trace(self, key: TraceKey) -> monitor_pb2.GetTraceResponse | None:
        """A whole trace."""
        return self.trace_of(self.keys.trace(*key))

    def trace_of(self, hashed: bytes) -> monitor_pb2.GetTraceResponse | None:
        """A whole trace, by the hash of its key."""
        row = self.run("SELECT state, info, trace FROM requests WHERE key = ?", (hashed,)).fetchone()
        if row is None:
            return None
        trace = monitor_pb2.GetTraceResponse.FromString(zlib.decompress(row[2]))
        trace.info.CopyFrom(_info(row[1], row[0]))
        return trace


def _info(raw: bytes, state: int) -> monitor_pb2.RequestInfo:
    info = monitor_pb2.RequestInfo.FromString(raw)
    info.state = state  # type: ignore[assignment]
    return info
