"""A store that is damaged, full, not ours, or too slow: the monitor serves on, says so, and recovers."""

import asyncio
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stream_monitor.config import MonitorSettings
from stream_monitor.monitor import events, recorder
from stream_monitor.monitor.database import Database, EventPage, StoredTrace
from stream_monitor.monitor.database_file import StoreRefused
from stream_monitor.monitor.events import CursorGone, EventLog, Subscriber
from stream_monitor.monitor.recovery import open_store
from stream_monitor.monitor.server import MonitorServer
from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.conftest import Running, until
from tests.monitor.process import MonitorProcess
from tests.monitor.synthetic import Engine
from tests.monitor.test_service import SHIFTING
from tests.monitor.test_store import names, stored, subscribe

Taken = Callable[[Subscriber], list[str]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "RETRY_SECONDS", (0.1,))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store" / "monitor.db"


def serves(monitor: Running) -> bool:
    status = health_pb2_grpc.HealthStub(monitor.channel).Check(health_pb2.HealthCheckRequest()).status
    return bool(status == health_pb2.HealthCheckResponse.SERVING and monitor.http("/readyz").status_code == 200)


def cursor_now(monitor: Running) -> str:
    stream = monitor.api.Subscribe(monitor_pb2.SubscribeRequest())
    cursor = next(stream).cursor
    stream.cancel()
    return str(cursor)


def status(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code()  # type: ignore[no-any-return]


def test_any_page_may_be_damaged(run: Callable[..., Running], store: Path) -> None:
    """Of random bytes SQLite does not always say that they are malformed: that a text is too big, or nothing at all."""
    monitor = run(store=str(store))
    monitor.publish(Engine().request("before-aaaaaaaa", SHIFTING))
    monitor.stop()
    whole = store.read_bytes()
    for seed in range(300):
        content = bytearray(whole)
        content[4096 + 8 :] = Random(seed).randbytes(len(content) - 4096 - 8)
        store.write_bytes(content)
        database, aside = open_store(store)
        database.close()
        assert aside is not None, seed
        aside.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM meta WHERE name = 'salt'",
        "UPDATE meta SET value = 'text' WHERE name = 'salt'",
        "UPDATE meta SET value = NULL WHERE name = 'newest'",
    ],
)
def test_a_file_without_its_salt_or_counts_is_damaged(store: Path, damage: str) -> None:
    database, _ = open_store(store)
    database.run(damage)
    database.close()
    database, aside = open_store(store)
    database.close()
    assert aside is not None


@pytest.mark.parametrize("damage", ["head", "page", "no database"])
def test_a_damaged_file_is_set_aside_at_start(
    run: Callable[..., Running], store: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = run(store=str(store))
    cursor = cursor_now(monitor)
    monitor.publish(Engine().request("before-aaaaaaaa", SHIFTING))
    monitor.stop()
    content = bytearray(store.read_bytes())
    if damage == "head":
        content[:100] = os.urandom(100)
    elif damage == "page":
        content[4096 + 8 :] = os.urandom(len(content) - 4096 - 8)
    else:
        content[:] = b"shopping list\n" * 1000
    store.write_bytes(content)
    again = run(store=str(store))
    (aside,) = store.parent.glob("monitor.db.corrupt-*")
    assert aside.read_bytes() == content
    assert f"{store} is damaged; it was set aside as {aside}" in caplog.text
    assert again.metric("stream_monitor_store_set_aside_total") == 1
    assert serves(again)
    assert status(lambda: subscribe(again.api, cursor)) is grpc.StatusCode.OUT_OF_RANGE
    again.publish(Engine().request("after-aaaaaaaa", SHIFTING))
    until(lambda: stored(store, "SELECT count(*) FROM events") == [(1,)])
    assert names(again.api) == ["after"]


def test_damage_met_while_it_runs(run: Callable[..., Running], store: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = run(store=str(store), max_traces=10)
    rank = Engine()
    for index in range(15):
        monitor.publish(rank.request(f"r{index}-aaaaaaaa", SHIFTING))
    until(lambda: stored(store, "SELECT count(*) FROM events") == [(15,)])
    cursor = cursor_now(monitor)
    assert monitor.call(checkpointed(monitor))
    size = store.stat().st_size
    with store.open("r+b") as file:
        file.seek(8192)
        file.write(os.urandom(size - 8192))
    # Of what left the memory, nothing is to be had any more; asking finds the damage.
    answers = set()

    def asked() -> bool:
        try:
            answers.add(len(names(monitor.api)))
        except grpc.RpcError as error:
            answers.add(error.code())
        return monitor.metric("stream_monitor_store_set_aside_total") == 1

    until(asked)
    assert answers <= {grpc.StatusCode.UNAVAILABLE, 10, 15}
    until(lambda: stored(store, "SELECT count(*) FROM requests") == [(10,)])
    assert "is damaged" in caplog.text
    assert serves(monitor)
    assert status(lambda: subscribe(monitor.api, cursor)) is grpc.StatusCode.OUT_OF_RANGE
    stream = subscribe(monitor.api)
    monitor.publish(rank.request("after-aaaaaaaa", SHIFTING))
    after = next(stream)
    assert after.event.external_id == "after"
    monitor.stop()
    again = run(store=str(store))
    assert len(names(again.api)) == 11
    subscribe(again.api, after.cursor).cancel()


async def checkpointed(monitor: Running) -> bool:
    """All is in the file, and no connection remembers it."""
    archive = monitor.server.archive

    def forget(database: Database) -> bool:
        database.run("PRAGMA shrink_memory")
        return database.empty_log()

    assert archive.recorder is not None
    assert archive._reader is not None
    await archive._in_reader(forget, archive._reader)
    return await asyncio.wrap_future(archive.recorder.call(forget))


def test_a_full_disk(run: Callable[..., Running], store: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = run(store=str(store))
    rank = Engine()
    before = subscribe(monitor.api)
    monitor.publish(rank.request("stored-aaaaaaaa", SHIFTING))
    durable = next(before).cursor
    until(lambda: stored(store, "SELECT count(*) FROM requests WHERE state = 2") == [(1,)])
    pages = stored(store, "PRAGMA page_count")[0][0]
    set_pages(monitor, pages)
    monitor.publish([m for i in range(9) for m in rank.request(f"full{i}-aaaaaaaa", SHIFTING)])
    sent = [next(before) for _ in range(9)]
    until(lambda: monitor.metric("stream_monitor_store_up") == 0)
    assert [response.event.external_id for response in sent] == [f"full{i}" for i in range(9)]
    assert f"{store} cannot be written (disk_full" in caplog.text
    assert serves(monitor)
    # A cursor given out now holds while the monitor runs; the first of those above may have been stored.
    monitor.publish([m for i in range(9, 12) for m in rank.request(f"full{i}-aaaaaaaa", SHIFTING)])
    volatile = next(before).cursor
    assert len(names(monitor.api)) == 13
    again = subscribe(monitor.api, volatile)
    assert [next(again).event.external_id for _ in range(2)] == ["full10", "full11"]
    assert status(lambda: delete(monitor, "stored")) is grpc.StatusCode.UNAVAILABLE
    assert names(monitor.api)[-1] != "stored"
    set_pages(monitor, 1 << 30)
    until(lambda: stored(store, "SELECT count(*) FROM events") == [(12,)])
    until(lambda: monitor.metric("stream_monitor_store_up") == 1)
    assert "can be written again" in caplog.text
    assert monitor.metric("stream_monitor_store_lost_total") == 0
    assert b"stored-aaaaaaaa" not in b"".join(path.read_bytes() for path in store.parent.iterdir())
    monitor.stop()
    after = run(store=str(store))
    assert status(lambda: subscribe(after.api, volatile)) is grpc.StatusCode.OUT_OF_RANGE
    resumed = subscribe(after.api, durable)
    assert [next(resumed).event.external_id for _ in range(9)] == [f"full{i}" for i in range(9)]


def set_pages(monitor: Running, pages: int) -> None:
    """How large SQLite may let the file grow: beyond it answers SQLITE_FULL, as a full disk does."""
    writer = monitor.server.archive.recorder
    assert writer is not None
    assert writer._database is not None
    writer._database.run(f"PRAGMA max_page_count = {pages}")


def delete(monitor: Running, request_id: str) -> None:
    monitor.api.DeleteRequest(monitor_pb2.DeleteRequestRequest(request_id=request_id))


def test_what_found_no_room_is_counted_and_told_on_resumption(
    run: Callable[..., Running], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MAX_EVENTS", 3)
    monitor = run(store=str(store))
    rank = Engine()
    stream = subscribe(monitor.api)
    monitor.publish(rank.request("stored-aaaaaaaa", SHIFTING))
    durable = next(stream).cursor
    until(lambda: stored(store, "SELECT count(*) FROM requests WHERE state = 2") == [(1,)])
    set_pages(monitor, stored(store, "PRAGMA page_count")[0][0])
    every: list[str] = []

    def publish() -> None:
        every.append(f"full{len(every)}")
        monitor.publish(rank.request(f"{every[-1]}-aaaaaaaa", SHIFTING))

    # What is left of the file takes some.
    until(lambda: publish() or monitor.metric("stream_monitor_store_up") == 0)
    for _ in range(8):
        publish()
    assert [next(stream).event.external_id for _ in every] == every
    set_pages(monitor, 1 << 30)
    until(lambda: monitor.metric("stream_monitor_store_up") == 1)
    until(lambda: monitor.metric("stream_monitor_store_queue_records") == 0)
    lost = int(monitor.metric("stream_monitor_store_lost_total", record="event", reason="disk_full"))
    assert lost == monitor.metric("stream_monitor_store_lost_total", record="event") >= 5
    monitor.stop()
    resumed = subscribe(run(store=str(store)).api, durable)
    responses = [next(resumed) for _ in range(len(every) - lost)]
    assert [response.event.external_id for response in responses] == every[: -3 - lost] + every[-3:]
    assert [response.lost for response in responses[-3:]] == [lost, 0, 0]


def test_findings_do_not_wait_for_the_traces_that_came_with_them(
    run: Callable[..., Running], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "BATCH_SECONDS", 0.5)
    committed: list[list[tuple[int]]] = []
    put_traces = Database.put_traces

    def look_first(database: Database, traces: Iterable[StoredTrace], now_ns: int) -> None:
        given = list(traces)
        if given:
            committed.append(stored(store, "SELECT count(*) FROM events"))
        put_traces(database, given, now_ns)

    monkeypatch.setattr(Database, "put_traces", look_first)
    run(store=str(store)).publish(Engine().request("a-aaaaaaaa", SHIFTING))
    until(lambda: stored(store, "SELECT count(*) FROM requests WHERE state = 2") == [(1,)])
    assert committed[0] == [(1,)]


def test_a_fault_of_our_own_is_told_and_overcome(
    run: Callable[..., Running], store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = run(store=str(store))
    stream = subscribe(monitor.api)
    with monkeypatch.context() as broken:
        broken.setattr(Database, "add_events", lambda *_: 1 / 0)
        monitor.publish(Engine().request("a-aaaaaaaa", SHIFTING))
        assert next(stream).event.external_id == "a"
        until(lambda: monitor.metric("stream_monitor_store_up") == 0)
    assert "cannot be written (error: division by zero)" in caplog.text
    until(lambda: stored(store, "SELECT count(*) FROM events") == [(1,)])
    until(lambda: monitor.metric("stream_monitor_store_up") == 1)


def test_a_process_that_may_write_no_more(tmp_path: Path) -> None:
    """Errors of the operating system itself, given and taken away from outside."""
    process = MonitorProcess(tmp_path)
    try:
        rank = Engine()
        stream = subscribe(process.api)
        process.publish(rank.request("a-aaaaaaaa", SHIFTING))
        assert next(stream).event.external_id == "a"
        assert process.process is not None
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        process.publish(rank.request("b-aaaaaaaa", SHIFTING))
        assert next(stream).event.external_id == "b"
        process.wait_for_log("cannot be written (")
        assert "b" in names(process.api)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        process.wait_for_log("can be written again", 20)
        until(lambda: stored(process.store, "SELECT count(*) FROM events") == [(2,)])
    finally:
        process.kill()


def test_a_store_that_cannot_be_opened_at_first(run: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the folder should be")
    store = tmp_path / "store" / "monitor.db"
    monitor = run(store=str(store))
    rank = Engine()
    assert serves(monitor)
    assert monitor.metric("stream_monitor_store_up") == 0
    stream = subscribe(monitor.api)
    monitor.publish(rank.request("early-aaaaaaaa", SHIFTING))
    assert next(stream).event.external_id == "early"
    (tmp_path / "store").unlink()
    until(lambda: monitor.metric("stream_monitor_store_up") == 1)
    until(lambda: stored(store, "SELECT count(*) FROM events") == [(1,)])
    monitor.publish(rank.request("late-aaaaaaaa", SHIFTING))
    cursor = next(stream).cursor
    monitor.stop()
    again = run(store=str(store))
    assert names(again.api) == ["late", "early"]
    subscribe(again.api, cursor).cancel()


def refused(store: Path) -> str:
    """What `serve` says."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "stream_monitor", "serve", "--store", str(store), "--grpc", "127.0.0.1:0"),
            *("--http", "127.0.0.1:0", "--ingest", f"unix:{store.parent / 'x.sock'}"),
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line


def test_what_must_not_be_used_is_refused_in_one_line(run: Callable[..., Running], store: Path) -> None:
    monitor = run(store=str(store))
    assert refused(store) == (
        f"stream-monitor: store: {store} is in use by another monitor; name another file with --store, or none: "
        "--store ''"
    )
    monitor.stop()
    stored(store, "PRAGMA user_version = 9")
    assert refused(store).startswith(f"stream-monitor: store: {store} has schema 9, this version knows 1: ")
    assert stored(store, "PRAGMA user_version") == [(9,)]
    other = store.parent / "other.db"
    stored(other, "CREATE TABLE shopping (item)")
    assert refused(other).startswith(f"stream-monitor: store: {other} is another program's database")


def test_a_refused_store_leaves_nothing_open(store: Path) -> None:
    store.parent.mkdir(mode=0o700)
    stored(store, "CREATE TABLE shopping (item)")
    for number in range(2):
        ingest = f"unix:{store.parent / str(number)}"
        addresses = {"ingest": ingest, "grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}
        with pytest.raises(StoreRefused, match="another program"):
            asyncio.run(MonitorServer(MonitorSettings(store=str(store), **addresses), "test").start())


# The event log's part, without a disk.


class SlowShelf:
    """A store that takes findings and commits none by itself."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def keep(self, sequence: int, event: monitor_pb2.Event) -> None:
        self.kept.append(sequence)

    async def events_after(self, sequence: int) -> EventPage:
        return EventPage([], sequence)


@pytest.fixture
def log() -> EventLog:
    log = EventLog(size=4, queue=100, max_subscribers=10)
    log.stored_in(SlowShelf(), 7)
    log.opened("epoch", 7, 0)
    return log


def finding(name: str) -> monitor_pb2.Event:
    return monitor_pb2.Event(kind=monitor_pb2.EVENT_KIND_ANCHOR_SHIFT, summary=name)


def progress(name: str) -> monitor_pb2.Event:
    return monitor_pb2.Event(kind=monitor_pb2.EVENT_KIND_SENTENCE_CLOSED, summary=name)


@pytest.fixture
def taken() -> Iterator[Taken]:
    """What waits for a subscriber."""
    with asyncio.Runner() as runner:

        async def all_that_waits(subscriber: Subscriber) -> list[str]:
            found: list[str] = []
            while True:
                try:
                    waiting = await asyncio.wait_for(subscriber.next(), 0.01)
                except TimeoutError:
                    return found
                assert waiting is not None
                found.append(waiting[1].summary)

        yield lambda subscriber: runner.run(all_that_waits(subscriber))


def test_nothing_overtakes_a_finding_that_waits_for_its_commit(log: EventLog, taken: Taken) -> None:
    subscriber, _ = log.subscribe(lambda _: True, "")
    log.publish(progress("p1"))
    log.publish(finding("f8"))
    log.publish(progress("p2"))
    log.publish(finding("f9"))
    log.publish(progress("p3"))
    assert taken(subscriber) == ["p1"]
    log.committed(8)
    assert taken(subscriber) == ["f8", "p2"]
    log.committed(9)
    assert taken(subscriber) == ["f9", "p3"]


def test_a_slow_store_holds_nothing_up_for_long(log: EventLog, taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    subscriber, _ = log.subscribe(lambda _: True, "")
    log.publish(finding("f8"))
    log.tick()
    assert taken(subscriber) == []
    monkeypatch.setattr(events, "PATIENCE_SECONDS", 0)
    log.tick()
    assert taken(subscriber) == ["f8"]
    log.publish(finding("f9"))
    assert taken(subscriber) == ["f9"]
    # Their cursors hold in this run alone, and become the store's when it has them.
    volatile = log.cursor(9)
    log.opened("epoch", 7, 0)
    assert log.cursor(9) == volatile != log.cursor(7)
    log.committed(9)
    assert log.cursor(9) != volatile
    restarted = EventLog(size=4, queue=100, max_subscribers=10)
    restarted.stored_in(SlowShelf(), 9)
    restarted.opened("epoch", 9, 0)
    restarted.subscribe(lambda _: True, log.cursor(9))
    with pytest.raises(CursorGone, match="another monitor start"):
        restarted.subscribe(lambda _: True, volatile)


def test_what_is_neither_in_memory_nor_in_the_store_is_told_as_lost(log: EventLog) -> None:
    _, start = log.subscribe(lambda _: True, "")
    log.troubled()
    for name in "abcdef":
        log.publish(finding(name))

    async def resumed() -> list[tuple[int, str, int]]:
        subscriber, _ = log.subscribe(lambda _: True, start)
        found = [await subscriber.next() for _ in range(4)]
        return [(sequence, event.summary, lost) for sequence, event, lost in found if event]

    assert asyncio.run(resumed()) == [(10, "c", 2), (11, "d", 0), (12, "e", 0), (13, "f", 0)]


def test_sqlite_errors_have_the_codes_that_reasons_go_by() -> None:
    with pytest.raises(sqlite3.OperationalError) as error:
        sqlite3.connect("/nowhere/x.db")
    assert error.value.sqlite_errorcode == sqlite3.SQLITE_CANTOPEN
