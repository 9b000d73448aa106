"""What a process of the fleet keeps of the stream, in a store like a monitor's: findings under their sequences there,
traces, and up to where all of it was read.

A store that is lost or damaged is read anew from the stream. It holds what the stream holds and nothing for longer, so
that all processes give the same answers and let go of the same cursors.
"""

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from stream_monitor.monitor.database import Database, StoredEvent, StoredTrace
from stream_monitor.monitor.database_file import StoreRefused
from stream_monitor.monitor.fleet import names
from stream_monitor.monitor.identity import TraceKey
from stream_monitor.monitor.retention import REQUESTS, Removed, forget_names
from stream_monitor.v1alpha1 import monitor_pb2

READ, DUPLICATE, LATE, MALFORMED = "read", "duplicate", "late", "malformed"
OUTCOMES = (READ, DUPLICATE, LATE, MALFORMED)
"""What became of a message: `late` are those of requests that were deleted."""


class OutOfStep(Exception):
    """The store was replaced by a new one meanwhile: what follows must be read from its position on."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One finding or trace of the stream."""

    sequence: int
    message: monitor_pb2.Event | monitor_pb2.GetTraceResponse

    @property
    def key(self) -> monitor_pb2.TraceKey:
        """Its request."""
        return self.message.key if isinstance(self.message, monitor_pb2.Event) else self.message.info.key


@dataclass
class Taken:
    """What became of some entries.

    Attributes:
        findings: new ones.
        outcomes: how many, by record and outcome (OUTCOMES).
        unwanted: sequences of those that should not be in the stream: duplicates, and what came late.
    """

    findings: list[tuple[int, monitor_pb2.Event]] = field(default_factory=list)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    unwanted: list[int] = field(default_factory=list)


def adopt(database: Database, epoch: str) -> None:
    """Make a store that of this stream: what it holds of another one is dropped.

    Raises StoreRefused if it is a monitor's own.
    """
    with database.transaction():
        known = database.run("SELECT 1 FROM meta WHERE name = 'position'").fetchone()
        if not known and database.run("SELECT 1 FROM requests UNION ALL SELECT 1 FROM events").fetchone():
            raise StoreRefused(
                f"fleet_store: {database.path} is the store of a monitor; name another file with --fleet-store"
            )
        if known and database.epoch == epoch:
            return
        for table in ("requests", "events", "names", "losses", "deleted"):
            database.run(f"DELETE FROM {table}")
        for name in ("newest", "forgotten", "position"):
            database.run("INSERT OR REPLACE INTO meta VALUES (?, 0)", (name,))
        database.run("UPDATE meta SET value = ? WHERE name = 'epoch'", (epoch,))
        database.epoch = epoch


def take(
    database: Database, entries: Sequence[Entry], after: int, last: int, buried: Container[TraceKey], now_ns: int
) -> Taken:
    """Keep messages read from after one sequence to another, all or none of them. Raises OutOfStep."""
    taken = Taken()
    with database.transaction():
        if database.meta("position") != after:
            raise OutOfStep
        for entry in entries:
            event = entry.message if isinstance(entry.message, monitor_pb2.Event) else None
            outcome = _keep(database, entry, buried, now_ns)
            taken.outcomes[names.TRACE if event is None else names.FINDING, outcome] += 1
            if outcome != READ:
                taken.unwanted.append(entry.sequence)
            elif event is not None:
                taken.findings.append((entry.sequence, event))
        database.set_meta("position", last)
    return taken


def bury(database: Database, request: str, after: int, last: int, until_ns: int) -> None:
    """The same of a message that says that a request, by its hash, is deleted. Raises OutOfStep."""
    with database.transaction():
        if database.meta("position") != after:
            raise OutOfStep
        database.bury({bytes.fromhex(request): until_ns})
        database.set_meta("position", last)


def _keep(database: Database, entry: Entry, buried: Container[TraceKey], now_ns: int) -> str:
    """Write an entry if it is wanted; its outcome."""
    if (entry.key.engine_instance, entry.key.request_id) in buried:
        return LATE
    if isinstance(entry.message, monitor_pb2.GetTraceResponse):
        database.put_traces([_stored_trace(entry.sequence, entry.message)], now_ns)
        return READ
    if _is_known(database, entry.sequence, entry.message):
        return DUPLICATE
    database.add_events([_stored_event(entry.sequence, entry.message)], now_ns)
    return READ


def let_go(database: Database, first: int) -> Removed:
    """A part of what the stream has let go: messages before its first. Empty when nothing is left of them."""
    with database.transaction():
        keys = database.run(
            "DELETE FROM requests WHERE serial IN (SELECT serial FROM requests WHERE serial < ?1 LIMIT ?2) "
            "RETURNING key",
            (first, REQUESTS),
        ).fetchall()
        removed = Removed({("trace", "age"): len(keys)} if keys else {})
        gone = database.run(
            "DELETE FROM events WHERE sequence IN (SELECT sequence FROM events WHERE sequence < ?1 LIMIT ?2) "
            "RETURNING sequence, key",
            (first, REQUESTS),
        ).fetchall()
        if gone:
            removed["event", "age"] += len(gone)
            _forget(database, max(sequence for sequence, _ in gone))
        forget_names(database, {key for (key,) in keys} | {key for _, key in gone})
    return removed


def miss(database: Database, first: int) -> None:
    """The stream let messages before its first go before they were read here: cursors into them do not hold."""
    with database.transaction():
        _forget(database, first - 1)


def _forget(database: Database, sequence: int) -> None:
    if sequence > database.meta("forgotten"):
        database.set_meta("forgotten", sequence)


def counts(database: Database) -> Counter[str]:
    """How much is held, by record."""
    return Counter(
        {
            names.FINDING: database.run("SELECT count(*) FROM events").fetchone()[0],
            names.TRACE: database.run("SELECT count(*) FROM requests").fetchone()[0],
        }
    )


def _is_known(database: Database, sequence: int, event: monitor_pb2.Event) -> bool:
    """Whether the same finding came before, under another sequence."""
    key = database.keys.trace(event.key.engine_instance, event.key.request_id)
    wanted = names.event_id(event)
    return any(
        number != sequence and names.event_id(monitor_pb2.Event.FromString(raw)) == wanted
        for number, raw in database.run("SELECT sequence, event FROM events WHERE key = ?", (key,))
    )


def _stored_event(sequence: int, event: monitor_pb2.Event) -> StoredEvent:
    key = event.key
    return StoredEvent(sequence, key.engine_instance, key.request_id, event.SerializeToString(deterministic=True))


def _stored_trace(sequence: int, trace: monitor_pb2.GetTraceResponse) -> StoredTrace:
    info = monitor_pb2.RequestInfo()
    info.CopyFrom(trace.info)
    rest = monitor_pb2.GetTraceResponse()
    rest.CopyFrom(trace)
    rest.ClearField("info")
    return StoredTrace(
        info.key.engine_instance,
        info.key.request_id,
        sequence,
        info.state,
        info.model_name,
        info.engine,
        info.SerializeToString(deterministic=True),
        rest.SerializeToString(deterministic=True),
    )
