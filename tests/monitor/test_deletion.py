"""A request that is deleted is gone: from answers, from memory, and from every byte of the store."""

import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from stream_monitor.monitor import recorder
from stream_monitor.monitor.database import Database, StoredTrace
from stream_monitor.monitor.erasure import erase
from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.conftest import Running
from tests.monitor.synthetic import Engine, Look, finished, started, tokens
from tests.monitor.test_service import SHIFTING
from tests.monitor.test_store import names, stored, subscribe, until

GONE, KEPT = "chatcmpl-gone-0a1b2c3d", "chatcmpl-kept-4e5f6a7b"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store" / "monitor.db"


@pytest.fixture(params=["memory", "store"])
def monitor(request: pytest.FixtureRequest, run: Callable[..., Running], store: Path) -> Running:
    return run(store=str(store) if request.param == "store" else "")


def delete(monitor: Running, request_id: str, **narrowing: Any) -> list[str]:
    asked = monitor_pb2.DeleteRequestRequest(request_id=request_id, **narrowing)
    return [key.request_id for key in monitor.api.DeleteRequest(asked).keys]


def files(store: Path) -> bytes:
    return b"".join(path.read_bytes() for path in store.parent.iterdir())


def test_nothing_of_it_is_left(run: Callable[..., Running], store: Path) -> None:
    monitor = run(store=str(store))
    rank = Engine()
    cursor = subscribe_and_leave(monitor)
    monitor.publish(rank.request(GONE, SHIFTING) + rank.request(KEPT, [4] * 14 + [40] * 8))
    until(lambda: stored(store, "SELECT count(*) FROM requests WHERE state = 2") == [(2,)])
    until(lambda: stored(store, "SELECT count(*) FROM events") == [(2,)])
    event = next(e for e in monitor.server.log.held_after(0) if e[1].key.request_id == GONE)[1]
    assert b"chatcmpl-gone" in files(store)
    assert "from sentence 0 to sentence 5" in event.summary
    assert event.summary.encode() in files(store)
    assert delete(monitor, "gone") == [GONE]
    left = files(store)
    assert b"gone" not in left
    assert event.summary.encode() not in left
    assert b"from sentence 0 to sentence 6" in left
    assert names(monitor.api) == ["chatcmpl-kept"]
    for ask in (
        lambda: monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="gone")),
        lambda: delete(monitor, GONE),
    ):
        with pytest.raises(grpc.RpcError) as error:
            ask()
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
    # Neither in memory nor after a restart does a cursor from before lead to it.
    assert next(subscribe(monitor.api, cursor)).event.external_id == "chatcmpl-kept"
    monitor.stop()
    again = run(store=str(store))
    assert names(again.api) == ["chatcmpl-kept"]
    assert next(subscribe(again.api, cursor)).event.external_id == "chatcmpl-kept"
    assert again.metric("stream_monitor_store_removed_total", reason="deleted") == 0
    assert b"gone" not in files(store)


def subscribe_and_leave(monitor: Running) -> str:
    stream = monitor.api.Subscribe(monitor_pb2.SubscribeRequest())
    cursor = next(stream).cursor
    stream.cancel()
    return str(cursor)


def test_what_comes_late_does_not_bring_it_back(monitor: Running) -> None:
    rank = Engine()
    monitor.publish(rank.request(GONE, [4] * 6)[:-1])
    assert delete(monitor, GONE) == [GONE]
    before = monitor.metric("stream_monitor_rows_total", outcome="discarded", reason="deleted")
    late = [
        rank.summary([Look(GONE, 84), Look(KEPT, 10)]),
        rank.summary(tokens=[tokens(GONE, 84)]),
        rank.summary(started=[started(GONE)]),
        rank.summary(finished=[finished(GONE, 90)]),
    ]
    monitor.publish(late)
    assert names(monitor.api) == ["chatcmpl-kept"]
    assert before == 0
    assert monitor.metric("stream_monitor_rows_total", outcome="discarded", reason="deleted") == rank.heads
    assert monitor.metric("stream_monitor_requests_deleted_total") == 1


def test_a_restart_remembers_what_was_deleted(run: Callable[..., Running], store: Path) -> None:
    monitor = run(store=str(store))
    rank = Engine()
    monitor.publish(rank.request(GONE, [4] * 6)[:-1])
    delete(monitor, GONE)
    monitor.stop()
    again = run(store=str(store))
    again.publish([rank.summary([Look(GONE, 84)]), rank.summary(finished=[finished(GONE, 90)])])
    assert names(again.api) == []
    assert again.metric("stream_monitor_rows_total", outcome="discarded", reason="deleted") == rank.heads
    assert b"gone" not in files(store)


def test_a_deletion_before_the_store_is_open_is_refused_or_reaches_it_then(
    run: Callable[..., Running], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "RETRY_SECONDS", (0.1,))
    monitor, rank = run(store=str(store)), Engine()
    monitor.publish(rank.request(GONE, [4] * 6)[:-1] + rank.request(KEPT, [4] * 6))
    monitor.stop()
    assert b"gone" in files(store)
    with out_of_reach(store):
        again = run(store=str(store))
        again.publish([rank.summary([Look(GONE, 84)])])
        for name, said in ((KEPT, "the store is not open yet (cannot_open)"), (GONE, "gone from memory, the request")):
            with pytest.raises(grpc.RpcError) as error:
                delete(again, name)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert said in error.value.details()
        assert names(again.api) == []
    until(lambda: again.metric("stream_monitor_store_up") == 1)
    until(lambda: b"gone" not in files(store))
    assert delete(again, KEPT) == [KEPT]


@contextmanager
def out_of_reach(store: Path) -> Iterator[None]:
    """A store's folder cannot be used for a while."""
    aside = store.parent.with_name("aside")
    store.parent.rename(aside)
    store.parent.write_text("a file where the folder should be")
    yield
    store.parent.unlink()
    aside.rename(store.parent)


def test_events_that_wait_for_a_subscriber_are_taken_back(monitor: Running) -> None:
    rank = Engine()
    stream = subscribe(monitor.api)
    (subscriber,) = monitor.server.log.subscribers
    key = monitor_pb2.TraceKey(engine_instance=rank.info.instance, request_id=GONE)

    async def flood_and_delete() -> None:
        log = monitor.server.log
        other = monitor_pb2.TraceKey(engine_instance=rank.info.instance, request_id=KEPT)
        for each in (key, key, other):
            log.publish(monitor_pb2.Event(kind=monitor_pb2.EVENT_KIND_ANCHOR_SHIFT, key=each))
        await monitor.server.deletion.delete([(key.engine_instance, key.request_id)], "test")

    monitor.call(flood_and_delete())
    assert next(stream).event.key.request_id == KEPT
    assert subscriber.lost == 0
    stream.cancel()


def test_all_samples_only_if_asked(monitor: Running) -> None:
    rank = Engine()
    samples = ["0_chatcmpl-n-cee6d49e", "1_chatcmpl-n-cee6d49e", "2_chatcmpl-n-cee6d49e"]
    for sample in samples:
        monitor.publish(rank.request(sample, [4]))
    with pytest.raises(grpc.RpcError) as ambiguous:
        delete(monitor, "chatcmpl-n")
    assert ambiguous.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert delete(monitor, "chatcmpl-n", sample_index=1) == [samples[1]]
    assert sorted(delete(monitor, "chatcmpl-n", all=True)) == [samples[0], samples[2]]
    assert names(monitor.api) == []


def test_the_audit_says_who_and_how_many_and_no_id(monitor: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monitor.publish(Engine().request(GONE, SHIFTING))
    delete(monitor, GONE)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "stream_monitor.audit"]
    assert line.startswith("1 requests deleted from memory")
    assert "127.0.0.1" in line
    assert "gone" not in caplog.text


def test_copies_that_sqlite_left_behind_are_found_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`secure_delete` does not reach what was left when rows moved between pages (erasure.py); such a history."""
    rewrites: list[bytes] = []
    rewrite = Database.rewrite

    def recorded(database: Database) -> None:
        rewrites.append((tmp_path / "monitor.db").read_bytes())
        rewrite(database)

    monkeypatch.setattr(Database, "rewrite", recorded)
    database = Database(tmp_path / "monitor.db", salt=bytes(16))
    draw = random.Random(38)
    live: dict[str, int] = {}
    deleted: list[str] = []
    serial = 0
    for _ in range(100):
        if not live or draw.random() < 0.5:
            serial += 1
            name = uuid.UUID(int=draw.getrandbits(128)).hex
            live[name] = serial
        elif draw.random() < 0.3:
            name = draw.choice(list(live))
            del live[name]
            deleted.append(name)
            erase(database, [("instance", name)], 0)
            continue
        else:
            name = draw.choice(list(live))
        info = name.encode() + draw.randbytes(draw.randint(50, 400))
        body = name.encode() + draw.randbytes(draw.choice([50, 500, 2000]))
        with database.transaction():
            database.put_traces([StoredTrace("instance", name, live[name], 2, "m", "0", info, body)], 1)
    database.close()
    left = (tmp_path / "monitor.db").read_bytes()
    assert len(deleted) > 10
    assert not [name for name in deleted if name.encode() in left]
    assert all(name.encode() in left for name in live)
    # All rows were gone, secure_delete was on, the log was empty, and yet:
    assert [name for name in deleted if name.encode() in rewrites[0]]
