"""What waits to be published. With a store it is a table beside the findings and traces, filled in the transaction that
writes them and emptied by the broker's acknowledgements: whatever ends in between, what is stored is published in the
end. Without a store it is in memory, bounded.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from stream_monitor.monitor.archive import Archive
from stream_monitor.monitor.database import Database, StoredTrace
from stream_monitor.monitor.fleet.names import DELETED, FINDING, TRACE
from stream_monitor.v1alpha1 import monitor_pb2

BATCH, BATCH_BYTES = 64, 4 << 20
"""Most messages, and about most bytes, on their way to the broker at a time."""
MAX_FINDINGS, MAX_TRACE_BYTES = 65_536, 64 << 20
"""What may wait in memory."""
LET_GO_SECONDS = 60.0
"""How often to look for what retention took, as often as retention itself."""
RECORDS = (FINDING, TRACE, DELETED)

EXPIRED, QUEUE_FULL, TOO_LARGE, DELETED_MEANWHILE = "expired", "queue_full", "too_large", "deleted"
LOSSES = (EXPIRED, QUEUE_FULL, TOO_LARGE, DELETED_MEANWHILE)
"""Why something is not published; the last is as it should be."""

log = logging.getLogger(__name__)

_RUNNING = monitor_pb2.REQUEST_STATE_RUNNING
_TABLE = f"""
CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT, record TEXT NOT NULL, sequence INTEGER, key BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS outbox_trace ON outbox (key) WHERE record = '{TRACE}';
CREATE INDEX IF NOT EXISTS outbox_deleted ON outbox (number) WHERE record = '{DELETED}';
CREATE TRIGGER IF NOT EXISTS outbox_event AFTER INSERT ON events BEGIN
    INSERT INTO outbox (record, sequence, key) VALUES ('{FINDING}', NEW.sequence, NEW.key);
END;
CREATE TRIGGER IF NOT EXISTS outbox_request AFTER INSERT ON requests WHEN NEW.state != {_RUNNING} BEGIN
    INSERT OR REPLACE INTO outbox (record, key) VALUES ('{TRACE}', NEW.key);
END;
CREATE TRIGGER IF NOT EXISTS outbox_cut AFTER UPDATE OF state ON requests WHEN NEW.state != {_RUNNING} BEGIN
    INSERT OR REPLACE INTO outbox (record, key) VALUES ('{TRACE}', NEW.key);
END;
"""
_TRIGGERS = ("outbox_event", "outbox_request", "outbox_cut")


@dataclass(frozen=True, slots=True)
class Waiting:
    """One thing to publish: a finding, a trace, or the hash of a request that is deleted.

    `gone` says why there is nothing to publish after all.
    """

    number: int
    record: str
    event: monitor_pb2.Event | None = None
    trace: monitor_pb2.GetTraceResponse | None = None
    deleted: str = ""
    gone: str = ""


class Outbox(Protocol):
    """Attributes:
    lost: what was not published, by record and reason (LOSSES).
    waiting: how much waits, by record, as of the last look.
    """

    lost: Counter[tuple[str, str]]
    waiting: Counter[str]

    async def next(self) -> list[Waiting]:
        """What is to be published next, in order; deletions before all else. Raises StoreUnavailable."""

    async def done(self, numbers: Iterable[int]) -> None:
        """These are with the broker, or given up."""

    async def delete(self, hashes: Iterable[str]) -> None:
        """Have deletions published."""

    async def tidy(self) -> None:
        """Called every few seconds: count, and let go what cannot be published any more. Raises StoreUnavailable."""


# With a store.


def begin(database: Database) -> None:
    """Have what is written to a store from now on wait for the broker too."""
    database.script(_TABLE)


def end(database: Database) -> None:
    """The opposite: this monitor has no broker any more, and what still waits is given up."""
    if not database.run("SELECT 1 FROM sqlite_master WHERE name = 'outbox'").fetchone():
        return
    if waiting := sum(_count(database).values()):
        log.warning("nats is not set: %d findings, traces and deletions waited for a broker and are given up", waiting)
    drops = "".join(f"DROP TRIGGER IF EXISTS {name};" for name in _TRIGGERS)
    database.script(f"{drops} DROP TABLE IF EXISTS outbox;")


class StoredOutbox:
    """What waits in the store of `archive`; see `Outbox`."""

    def __init__(self, archive: Archive) -> None:
        self.lost: Counter[tuple[str, str]] = Counter()
        self.waiting: Counter[str] = Counter()
        self._archive = archive
        self._looked = time.monotonic()

    async def next(self) -> list[Waiting]:
        return await self._archive.read(_next, [])

    async def done(self, numbers: Iterable[int]) -> None:
        rows = [(number,) for number in numbers]
        await self._archive.write(lambda database: database.run_many("DELETE FROM outbox WHERE number = ?", rows))

    async def delete(self, hashes: Iterable[str]) -> None:
        rows = [(DELETED, bytes.fromhex(each)) for each in hashes]
        statement = "INSERT INTO outbox (record, key) VALUES (?, ?)"
        await self._archive.write(lambda database: database.run_many(statement, rows))

    async def tidy(self) -> None:
        self.waiting = await self._archive.read(_count, self.waiting)
        if time.monotonic() - self._looked < LET_GO_SECONDS:
            return
        self._looked = time.monotonic()
        if expired := await self._archive.write(_let_go):
            self.lost.update({(record, EXPIRED): count for record, count in expired.items()})


def _next(database: Database) -> list[Waiting]:
    columns = "SELECT number, record, sequence, key FROM outbox"
    rows = database.run(f"{columns} WHERE record = '{DELETED}' ORDER BY number LIMIT {BATCH}").fetchall()
    # Two queries: where much waits, sorting all of it for each batch would take the reader's time.
    rows = rows or database.run(f"{columns} ORDER BY number LIMIT {BATCH}").fetchall()
    found: list[Waiting] = []
    size = 0
    for number, record, sequence, key in rows:
        if record == DELETED:
            found.append(Waiting(number, record, deleted=key.hex()))
            continue
        if size > BATCH_BYTES:
            break
        if record == FINDING:
            event = database.event(sequence)
            size += event.ByteSize() if event else 0
            found.append(Waiting(number, record, event=event, gone="" if event else _why_gone(database, key)))
        else:
            trace = database.trace_of(key)
            size += trace.ByteSize() if trace else 0
            found.append(Waiting(number, record, trace=trace, gone="" if trace else _why_gone(database, key)))
    return found


def _why_gone(database: Database, key: bytes) -> str:
    return DELETED_MEANWHILE if database.run("SELECT 1 FROM deleted WHERE key = ?", (key,)).fetchone() else EXPIRED


def _count(database: Database) -> Counter[str]:
    return Counter(dict(database.run("SELECT record, count(*) FROM outbox GROUP BY record").fetchall()))


def _let_go(database: Database) -> Counter[str]:
    """What retention took from the store while it waited."""
    with database.transaction():
        found = database.run(
            "DELETE FROM outbox WHERE key NOT IN (SELECT key FROM deleted) AND ("
            f"record = '{FINDING}' AND NOT EXISTS (SELECT 1 FROM events WHERE events.sequence = outbox.sequence) OR "
            f"record = '{TRACE}' AND NOT EXISTS (SELECT 1 FROM requests WHERE requests.key = outbox.key)"
            ") RETURNING record"
        ).fetchall()
    return Counter(record for (record,) in found)


# Without a store.


class MemoryOutbox:
    """What waits in memory; the oldest is lost where there is too much. See `Outbox`."""

    def __init__(self) -> None:
        self.lost: Counter[tuple[str, str]] = Counter()
        self.waiting: Counter[str] = Counter()
        self._held: dict[str, dict[int, Waiting]] = {record: {} for record in RECORDS}
        self._sizes: dict[int, int] = {}
        self._trace_bytes = 0
        self._number = 0

    def add_event(self, event: monitor_pb2.Event) -> None:
        """A finding."""
        self._add(Waiting(self._next_number(), FINDING, event=event))
        if len(self._held[FINDING]) > MAX_FINDINGS:
            self._drop(FINDING)

    def put_trace(self, trace: StoredTrace) -> None:
        """A closed trace."""
        number = self._next_number()
        self._sizes[number] = trace.size
        self._trace_bytes += trace.size
        self._add(Waiting(number, TRACE, trace=trace.whole()))
        while self._trace_bytes > MAX_TRACE_BYTES and len(self._held[TRACE]) > 1:
            self._drop(TRACE)

    async def next(self) -> list[Waiting]:
        found: list[Waiting] = []
        size = 0
        for record in (DELETED, FINDING, TRACE):
            for waiting in self._held[record].values():
                if len(found) < BATCH and size < BATCH_BYTES:
                    found.append(waiting)
                    size += self._sizes.get(waiting.number, 0)
        return found

    async def done(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            for record, held in self._held.items():
                if held.pop(number, None) is not None:
                    self.waiting[record] -= 1
                    self._trace_bytes -= self._sizes.pop(number, 0)

    async def delete(self, hashes: Iterable[str]) -> None:
        for each in hashes:
            self._add(Waiting(self._next_number(), DELETED, deleted=each))

    async def tidy(self) -> None:
        pass

    def forget(self, keys: Iterable[tuple[str, str]]) -> None:
        """Take back what waits of requests that are deleted."""
        gone = set(keys)
        for record in (FINDING, TRACE):
            for number, waiting in list(self._held[record].items()):
                key = waiting.event.key if waiting.event is not None else waiting.trace.info.key  # type: ignore[union-attr]
                if (key.engine_instance, key.request_id) in gone:
                    self._drop(record, number, DELETED_MEANWHILE)

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _add(self, waiting: Waiting) -> None:
        self._held[waiting.record][waiting.number] = waiting
        self.waiting[waiting.record] += 1

    def _drop(self, record: str, number: int | None = None, reason: str = QUEUE_FULL) -> None:
        held = self._held[record]
        number = next(iter(held)) if number is None else number
        del held[number]
        self.waiting[record] -= 1
        self._trace_bytes -= self._sizes.pop(number, 0)
        self.lost[record, reason] += 1
