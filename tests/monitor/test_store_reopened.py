"""A store that is opened again, late, or after what was to be in it was deleted: numbers and cursors hold."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from stream_monitor.monitor import recorder
from stream_monitor.monitor.database import Database
from stream_monitor.monitor.fleet import outbox
from stream_monitor.monitor.intake import Stream
from stream_monitor.v1alpha1 import ingest_pb2, monitor_pb2
from tests.monitor.conftest import Running, until
from tests.monitor.synthetic import Engine
from tests.monitor.test_service import SHIFTING
from tests.monitor.test_store import names
from tests.monitor.test_store_failures import cursor_now


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where monitors that try again soon have theirs."""
    monkeypatch.setattr(recorder, "RETRY_SECONDS", (0.1,))
    return tmp_path / "store" / "monitor.db"


def test_a_store_that_fails_while_it_is_opened_is_opened_again_as_a_whole(
    run: Callable[..., Running], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(store=str(store))
    first.publish(Engine().request("old-aaaaaaaa", SHIFTING))
    until(lambda: first.metric("stream_monitor_store_written_total", record="trace") >= 1)
    first.stop()
    real, calls = outbox.end, []

    def full_at_first(database: Database) -> None:
        calls.append(database)
        if len(calls) == 1:
            raise sqlite3.OperationalError("database or disk is full")
        real(database)

    monkeypatch.setattr(outbox, "end", full_at_first)
    monitor = run(store=str(store))
    until(lambda: monitor.metric("stream_monitor_store_up") == 1)
    assert len(calls) == 2
    assert names(monitor.api) == ["old"]
    stream = monitor.api.Subscribe(monitor_pb2.SubscribeRequest())
    next(stream)
    monitor.publish(Engine().request("new-aaaaaaaa", SHIFTING))
    cursor = next(stream).cursor
    monitor.stop()
    assert next(run(store=str(store)).api.Subscribe(monitor_pb2.SubscribeRequest(cursor=cursor))).cursor == cursor


def test_the_number_of_a_finding_deleted_before_its_commit_is_not_given_again(
    run: Callable[..., Running], store: Path
) -> None:
    monitor = run(store=str(store))
    monitor.publish(Engine().request("a-aaaaaaaa", SHIFTING))
    rank = Engine()
    raw = [ingest_pb2.PublishRequest(summary=each).SerializeToString() for each in rank.request("b-aaaaaaaa", SHIFTING)]

    async def found_and_deleted() -> None:
        monitor.server.intake.take(raw, Stream())
        monitor.server.intake.score()
        await monitor.server.deletion.delete([(rank.info.instance, "b-aaaaaaaa")], "test")

    monitor.call(found_and_deleted())
    # What comes next carries the cursor of the deleted one.
    stream = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(kinds=[monitor_pb2.EVENT_KIND_SENTENCE_CLOSED]))
    next(stream)
    monitor.publish(Engine().request("quiet-aaaaaaaa", [4] * 3))
    cursor = next(stream).cursor
    monitor.stop()
    again = run(store=str(store))
    again.publish(Engine().request("c-aaaaaaaa", SHIFTING))
    resumed = again.api.Subscribe(monitor_pb2.SubscribeRequest(cursor=cursor))
    next(resumed)
    assert next(resumed).event.external_id == "c"


def test_a_store_that_comes_late_reports_no_loss_of_numbers_never_given(
    run: Callable[..., Running], tmp_path: Path, store: Path
) -> None:
    first = run(store=str(store))
    first.publish(Engine().request("a-aaaaaaaa", SHIFTING))
    until(lambda: first.metric("stream_monitor_store_written_total", record="event") >= 1)
    cursor = cursor_now(first)
    first.stop()
    store.parent.rename(tmp_path / "away")
    store.parent.write_text("not mounted yet")
    monitor = run(store=str(store))
    store.parent.unlink()
    (tmp_path / "away").rename(store.parent)
    until(lambda: monitor.metric("stream_monitor_store_up") == 1)
    resumed = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(cursor=cursor))
    next(resumed)
    monitor.publish(Engine().request("b-aaaaaaaa", SHIFTING))
    found = next(resumed)
    assert (found.event.external_id, found.lost) == ("b", 0)
