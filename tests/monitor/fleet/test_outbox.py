"""What waits for the broker: written with what it refers to, bounded, and every loss counted."""

import asyncio
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from stream_monitor.config import MonitorSettings
from stream_monitor.monitor.archive import StoreUnavailable
from stream_monitor.monitor.database import Database, StoredEvent, StoredTrace
from stream_monitor.monitor.erasure import erase
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.fleet import outbox
from stream_monitor.monitor.fleet.link import Link
from stream_monitor.monitor.fleet.names import DELETED, FINDING, TRACE
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.retention import let_go_some
from stream_monitor.monitor.store import TraceStore
from stream_monitor.v1alpha1 import monitor_pb2

FINISHED, RUNNING = monitor_pb2.REQUEST_STATE_FINISHED, monitor_pb2.REQUEST_STATE_RUNNING


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(tmp_path / "monitor.db")
    outbox.begin(made)
    return made


def key(name: str) -> monitor_pb2.TraceKey:
    return monitor_pb2.TraceKey(engine_instance="i", request_id=name)


def event(sequence: int, name: str) -> StoredEvent:
    return StoredEvent(sequence, "i", name, monitor_pb2.Event(key=key(name)).SerializeToString())


def trace(serial: int, name: str, state: int = FINISHED) -> StoredTrace:
    info = monitor_pb2.RequestInfo(key=key(name)).SerializeToString()
    return StoredTrace("i", name, serial, state, "m", "0", info, b"")


def write(database: Database, *rows: StoredEvent | StoredTrace, now: int = 1) -> None:
    with database.transaction():
        database.add_events([row for row in rows if isinstance(row, StoredEvent)], now)
        database.put_traces([row for row in rows if not isinstance(row, StoredEvent)], now)


def waiting(database: Database) -> list[tuple[str, str]]:
    return [
        (each.record, each.gone or (each.event.key if each.event else each.trace.info.key).request_id)  # type: ignore[union-attr]
        for each in outbox._next(database)
    ]


def test_findings_and_closed_traces_wait_and_a_trace_once(database: Database) -> None:
    write(database, event(1, "a"), trace(1, "a", RUNNING))
    assert waiting(database) == [(FINDING, "a")]
    write(database, trace(1, "a"))
    write(database, trace(1, "a"), event(2, "b"))
    assert waiting(database) == [(FINDING, "a"), (FINDING, "b"), (TRACE, "a")]
    write(database, trace(2, "b", RUNNING))
    with database.transaction():
        database.cut_running()
    assert waiting(database)[-1] == (TRACE, "b")


def test_what_a_transaction_that_failed_wrote_does_not_wait(database: Database) -> None:
    with pytest.raises(AttributeError):
        write(database, event(1, "a"), None)  # type: ignore[arg-type]
    assert database.run("SELECT count(*) FROM events").fetchone() == (0,)
    assert waiting(database) == []


def test_what_retention_took_is_counted_and_what_was_deleted_is_not_among_it(database: Database) -> None:
    write(database, event(1, "old"), trace(1, "old"), event(2, "gone"), trace(2, "gone"))
    write(database, event(3, "new"), now=10)
    erase(database, [("i", "gone")], until_ns=100)
    while let_go_some(database, 5, 1 << 30):
        pass
    assert outbox._let_go(database) == Counter({FINDING: 1, TRACE: 1})
    assert sorted(waiting(database)) == [
        (FINDING, outbox.DELETED_MEANWHILE),
        (FINDING, "new"),
        (TRACE, outbox.DELETED_MEANWHILE),
    ]


def test_deletions_go_first(database: Database) -> None:
    write(database, event(1, "a"))
    database.run_many("INSERT INTO outbox (record, key) VALUES (?, ?)", [(DELETED, bytes.fromhex("ab" * 16))])
    assert [each.deleted for each in outbox._next(database)] == ["ab" * 16]


def test_a_monitor_without_a_broker_gives_up_what_waited(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    write(database, event(1, "a"))
    with caplog.at_level(logging.WARNING):
        outbox.end(database)
    assert "1 findings, traces and deletions waited for a broker and are given up" in caplog.text
    write(database, event(2, "b"))
    assert database.run("SELECT count(*) FROM sqlite_master WHERE name LIKE 'outbox%'").fetchone() == (0,)
    outbox.end(database)


def test_in_memory_the_oldest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_FINDINGS", 2)
    monkeypatch.setattr(outbox, "MAX_TRACE_BYTES", 2 * trace(1, "a").size)
    held = outbox.MemoryOutbox()
    for number, name in enumerate("abc"):
        held.add_event(monitor_pb2.Event(key=key(name)))
        held.put_trace(trace(number, name))
    found = asyncio.run(held.next())
    assert [each.event.key.request_id for each in found if each.event] == ["b", "c"]
    assert [each.trace.info.key.request_id for each in found if each.trace] == ["b", "c"]
    assert held.lost == {(FINDING, outbox.QUEUE_FULL): 1, (TRACE, outbox.QUEUE_FULL): 1}
    held.forget([("i", "b")])
    asyncio.run(held.done(each.number for each in found))
    assert asyncio.run(held.next()) == []
    assert held.waiting.total() == 0


def test_a_deletion_heard_while_the_store_cannot_be_read_is_heard_again() -> None:
    """What comes from the broker is told again after a failure, and is no news then."""
    archive, deletion = SimpleNamespace(), SimpleNamespace()
    reads, deleted = [], []

    async def find(hashed: str, visible: object, buried: bool) -> list[tuple[tuple[str, str], object]]:
        reads.append(hashed)
        if len(reads) == 1:
            raise StoreUnavailable("the store cannot be read now")
        return [(("i", "r"), None)]

    async def delete(keys: list[tuple[str, str]], who: str, everywhere: bool) -> None:
        deleted.extend(keys)

    archive.find, deletion.delete = find, delete
    settings = MonitorSettings(nats="nats://127.0.0.1:4222", store="")
    log = EventLog(10, 10, 10)
    link = Link(settings, archive, log, TraceStore(10, 1 << 20, 10), Graveyard(), deletion)
    with pytest.raises(StoreUnavailable):
        asyncio.run(link._heard(["ab" * 16]))
    asyncio.run(link._heard(["ab" * 16]))
    assert deleted == [("i", "r")]
    asyncio.run(link._heard(["ab" * 16]))
    assert len(reads) == 2, "dealt with once"
