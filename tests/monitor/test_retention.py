"""What leaves the store by age and by size, and what a cursor from before is told."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from stream_monitor.monitor import archive
from stream_monitor.monitor.database import Database, StoredEvent, StoredTrace
from stream_monitor.monitor.recovery import let_go_aside, set_aside
from stream_monitor.monitor.retention import EVENTS, REQUESTS, TRACE_BYTES, Removed, housekeep, let_go_some
from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.conftest import Running, until
from tests.monitor.synthetic import Engine
from tests.monitor.test_service import SHIFTING
from tests.monitor.test_store import names, stored, subscribe


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "monitor.db")


def fill(database: Database, numbers: range, now_ns: int, size: int = 100) -> None:
    """A request with a finding for each number."""
    with database.transaction():
        for number in numbers:
            name = f"r{number}-{number:08x}"
            key = monitor_pb2.TraceKey(engine_instance="i", request_id=name)
            info = monitor_pb2.RequestInfo(key=key).SerializeToString()
            database.put_traces([StoredTrace("i", name, number, 2, "m", "0", info, os.urandom(size))], now_ns)
            event = monitor_pb2.Event(key=key).SerializeToString()
            database.add_events([StoredEvent(number, "i", name, event)], now_ns)


def let_go(database: Database, before_ns: int, max_bytes: int = 1 << 40) -> Removed:
    total = Removed()
    while removed := let_go_some(database, before_ns, max_bytes):
        assert sum(removed.values()) <= REQUESTS + EVENTS
        total += removed
    return total


def held(database: Database) -> tuple[list[int], list[int], int]:
    return (
        [n for (n,) in database.run("SELECT serial FROM requests ORDER BY serial")],
        [n for (n,) in database.run("SELECT sequence FROM events ORDER BY sequence")],
        database.run("SELECT count(DISTINCT key) FROM names").fetchone()[0],
    )


def test_what_is_too_old_goes_with_its_names(database: Database) -> None:
    fill(database, range(1, 251), now_ns=1000)
    fill(database, range(251, 256), now_ns=2000)
    assert let_go(database, 2000) == {("trace", "age"): 250, ("event", "age"): 250}
    assert held(database) == (list(range(251, 256)), list(range(251, 256)), 5)
    assert database.meta("forgotten") == 250
    assert not let_go(database, 2000)


def test_of_large_traces_few_go_at_a_time(database: Database) -> None:
    for number in range(1, 11):
        fill(database, range(number, number + 1), now_ns=number, size=TRACE_BYTES // 3)
    rest = list(range(1, 11))
    for _ in range(3):
        assert let_go_some(database, 11, 1 << 40) == {("trace", "age"): 3, ("event", "age"): 3}
        rest = rest[3:]
        assert held(database) == (rest, rest, len(rest))
    assert let_go(database, 11) == {("trace", "age"): 1, ("event", "age"): 1}
    assert held(database) == ([], [], 0)


@pytest.mark.parametrize("days", [30, -30])
def test_a_clock_that_jumps_makes_nothing_old(
    run: Callable[..., Running],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    days: int,
) -> None:
    monkeypatch.setattr(archive, "RETENTION_SECONDS", 0.02)
    store, rank = tmp_path / "store" / "monitor.db", Engine()
    monitor = run(store=str(store))
    stream = subscribe(monitor.api)
    monitor.publish(rank.request("before-aaaaaaaa", SHIFTING))
    cursor = next(stream).cursor
    right = time.time_ns
    with monkeypatch.context() as jumped:
        asked = 0

        def wrong() -> int:
            nonlocal asked
            asked += 1
            return right() + days * 86400 * 10**9

        jumped.setattr(time, "time_ns", wrong)
        monitor.publish(rank.request("meanwhile-aaaaaaaa", SHIFTING))
        assert next(stream).event.external_id == "meanwhile"
        until(lambda: stored(store, "SELECT count(*) FROM events") == [(2,)])
        seen = asked
        until(lambda: asked > seen + 20)  # retention has looked
        assert ("clock jumped ahead by" in caplog.text) == (days > 0)
    monitor.publish(rank.request("after-aaaaaaaa", SHIFTING))
    resumed = subscribe(monitor.api, cursor)
    assert [next(resumed).event.external_id for _ in range(2)] == ["meanwhile", "after"]
    assert names(monitor.api) == ["after", "meanwhile", "before"]
    until(lambda: stored(store, "SELECT count(*) FROM events") == [(3,)])


def test_the_names_of_a_request_stay_while_its_findings_do(database: Database) -> None:
    fill(database, range(1, 2), now_ns=1000)
    with database.transaction():
        event = monitor_pb2.Event(key=monitor_pb2.TraceKey(engine_instance="i", request_id="r1-00000001"))
        database.add_events([StoredEvent(2, "i", "r1-00000001", event.SerializeToString())], 2000)
    assert let_go(database, 2000) == {("trace", "age"): 1, ("event", "age"): 1}
    assert held(database) == ([], [2], 1)
    assert database.find("r1") == [(("i", "r1-00000001"), 1, "")]
    let_go(database, 3000)
    assert held(database) == ([], [], 0)


def test_what_is_too_much_goes_oldest_first(database: Database) -> None:
    for number in range(1, 401):
        fill(database, range(number, number + 1), now_ns=number, size=4000)
    limit = database.used_bytes // 2
    removed = let_go(database, 0, limit)
    assert set(removed) == {("trace", "size"), ("event", "size")}
    assert database.used_bytes <= limit
    requests, events, found = held(database)
    assert requests == events == list(range(401 - len(requests), 401))
    assert found == len(requests) >= 100
    # The file does not grow when the room is used again.
    database.empty_log()
    size = database.file_bytes
    for number in range(401, 451):
        fill(database, range(number, number + 1), now_ns=number, size=4000)
    database.empty_log()
    assert database.file_bytes == size


def test_damaged_files_and_marks_of_deleted_requests_go_too(database: Database, tmp_path: Path) -> None:
    old, new = tmp_path / "monitor.db.corrupt-1", tmp_path / "monitor.db.corrupt-2"
    old.touch()
    middle = time.time_ns()
    time.sleep(0.02)
    new.touch()
    database.bury({b"a": 5, b"b": 50})
    housekeep(database, middle, 10)
    assert (old.exists(), new.exists()) == (False, True)
    assert database.tombstones() == {b"b": 50}
    let_go_aside(tmp_path / "monitor.db", time.time_ns() + 1)
    assert not new.exists()


def test_the_time_of_a_file_that_is_set_aside_begins_then(tmp_path: Path) -> None:
    """However long ago it was written."""
    store = tmp_path / "monitor.db"
    store.write_text("shopping list")
    os.utime(store, (1, 1))
    begun = time.time_ns() - 10**9
    aside = set_aside(store)
    let_go_aside(store, begun)
    assert aside.read_text() == "shopping list"


def test_a_cursor_from_before_is_told_the_oldest_held(
    run: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "RETENTION_SECONDS", 0.1)
    store = tmp_path / "store" / "monitor.db"
    monitor = run(store=str(store), store_days=3 / 86_400, event_log=1)
    rank = Engine()
    stream = subscribe(monitor.api)
    monitor.publish([m for i in range(3) for m in rank.request(f"old{i}-aaaaaaaa", SHIFTING)])
    cursor = next(stream).cursor
    until(lambda: stored(store, "SELECT count(*) FROM events") == [(0,)])
    monitor.publish(rank.request("new-aaaaaaaa", SHIFTING))
    with pytest.raises(grpc.RpcError) as error:
        subscribe(monitor.api, cursor)
    assert error.value.code() is grpc.StatusCode.OUT_OF_RANGE
    oldest = dict(error.value.trailing_metadata())["oldest-cursor"]
    assert oldest in error.value.details()
    assert next(subscribe(monitor.api, oldest)).event.external_id == "new"
    assert monitor.metric("stream_monitor_store_removed_total", record="event", reason="age") == 3
    # In memory they are held as before.
    assert names(monitor.api) == ["new", "old2", "old1", "old0"]


def test_what_is_too_old_goes_at_start(run: Callable[..., Running], tmp_path: Path) -> None:
    store = tmp_path / "monitor.db"
    monitor = run(store=str(store))
    monitor.publish(Engine().request("old-aaaaaaaa", SHIFTING))
    monitor.stop()
    assert stored(store, "SELECT count(*) FROM requests") == [(1,)]
    time.sleep(0.1)
    again = run(store=str(store), store_days=1e-7)
    until(lambda: stored(store, "SELECT count(*) FROM requests") == [(0,)])
    assert names(again.api) == []
