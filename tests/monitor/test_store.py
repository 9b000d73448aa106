"""What is kept over restarts, and what is let go: with a real monitor in a process of its own where it is killed."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from stream_monitor.monitor import archive
from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.conftest import Running, until
from tests.monitor.process import MonitorProcess
from tests.monitor.synthetic import Engine, started
from tests.monitor.test_service import SHIFTING

FIRST, LAST = 4, 30
"""Tokens in the sentences that a shifting request rests on before and after."""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[MonitorProcess]:
    running = MonitorProcess(tmp_path)
    yield running
    running.kill()


def subscribe(api: Any, cursor: str = "") -> Any:
    stream = api.Subscribe(monitor_pb2.SubscribeRequest(cursor=cursor), timeout=30)
    assert not next(stream).HasField("event")
    return stream


def names(api: Any, **asked: Any) -> list[str]:
    return [info.external_id for info in api.ListRequests(monitor_pb2.ListRequestsRequest(**asked)).requests]


def stored(path: Path, query: str) -> Any:
    """What the file holds now; None if it is being made."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    except sqlite3.OperationalError:
        return None
    finally:
        connection.close()


def test_a_subscriber_resumes_across_kills_without_loss_or_repetition(process: MonitorProcess) -> None:
    rank = Engine()
    stream = subscribe(process.api)
    seen, cursor = [], ""
    for round in range(3):
        process.publish([m for i in range(4) for m in rank.request(f"r{round}{i}-aaaaaaaa", SHIFTING)])
        # Half of them are read before the kill, the others wait for whoever resumes.
        for _ in range(2):
            response = next(stream)
            seen.append(response.event.external_id)
            cursor = response.cursor
        until(lambda held=4 * round + 4: stored(process.store, "SELECT count(*) FROM events") == [(held,)])
        process.kill()
        process.start()
        stream = subscribe(process.api, cursor)
        for _ in range(2):
            response = next(stream)
            seen.append(response.event.external_id)
            cursor = response.cursor
            assert response.lost == 0
    assert seen == [f"r{round}{i}" for round in range(3) for i in range(4)]


def test_what_a_subscriber_has_is_in_the_store(process: MonitorProcess) -> None:
    """Killed the moment the event arrives."""
    rank = Engine()
    for round in range(3):
        stream = subscribe(process.api)
        process.publish(rank.request(f"r{round}-aaaaaaaa", SHIFTING))
        cursor = next(stream).cursor
        process.kill()
        assert stored(process.store, "SELECT count(*) FROM events") == [(round + 1,)]
        process.start()
        subscribe(process.api, cursor).cancel()


def test_finished_traces_outlive_a_kill_and_running_ones_are_marked_as_cut(process: MonitorProcess) -> None:
    rank = Engine()
    process.publish(rank.request("chatcmpl-done-aaaaaaaa", [FIRST] * 6))
    process.publish(rank.request("chatcmpl-found-bbbbbbbb", SHIFTING)[:-1])
    process.publish(rank.request("chatcmpl-runs-cccccccc", [FIRST] * 6)[:-1])
    asked = monitor_pb2.GetTraceRequest(request_id="done")
    before = process.api.GetTrace(asked)
    running = process.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="found"))
    whole = "SELECT count(*), sum(length(trace) > 100) FROM requests"
    until(lambda: stored(process.store, whole) == [(3, 2)], seconds=30)
    process.kill()
    process.start()
    assert process.api.GetTrace(asked) == before
    listed = process.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests
    assert [(info.external_id, info.state) for info in listed] == [
        ("chatcmpl-runs", monitor_pb2.REQUEST_STATE_CUT),
        ("chatcmpl-found", monitor_pb2.REQUEST_STATE_CUT),
        ("chatcmpl-done", monitor_pb2.REQUEST_STATE_FINISHED),
    ]
    # One with a finding has its evidence: the trace as it was soon after.
    found = process.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="found"))
    assert list(found.events) == list(running.events) != []
    assert len(found.matrix_row) > 0
    assert found.events[0].sentence.index < len(found.sentences)
    # Of one without, what was known at its start.
    runs = process.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="runs"))
    assert (runs.info.prompt_tokens, len(runs.sentences)) == (48, 0)
    # The engine goes on with it: a trace that says that its beginning is missing.
    process.publish([rank.summary(finished=[finished_at("chatcmpl-runs-cccccccc")])])
    until(lambda: bool(names(process.api)))
    tokens_of = rank.request("chatcmpl-runs-cccccccc", [FIRST] * 2)[1:]
    process.publish(tokens_of)
    runs = process.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="runs"))
    assert runs.info.joined_late
    assert runs.info.state == monitor_pb2.REQUEST_STATE_FINISHED


def finished_at(request_id: str) -> Any:
    from tests.monitor.synthetic import finished

    return finished(request_id, 84)


def test_a_monitor_that_is_stopped_keeps_running_traces_whole(process: MonitorProcess) -> None:
    rank = Engine()
    process.publish(rank.request("runs-aaaaaaaa", [FIRST] * 6)[:-1])
    before = process.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="runs"))
    process.stop()
    process.start()
    after = process.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="runs"))
    assert after.info.state == monitor_pb2.REQUEST_STATE_CUT
    before.info.state = after.info.state
    assert after == before


def test_the_files_are_the_users_alone(process: MonitorProcess) -> None:
    process.publish(Engine().request("r-aaaaaaaa", SHIFTING))
    files = list(process.store.parent.iterdir())
    assert {file.name for file in files} >= {"monitor.db", "monitor.db-wal", "monitor.db-shm"}
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o600"}
    assert oct(process.store.parent.stat().st_mode & 0o777) == "0o700"


@pytest.fixture
def start(run: Callable[..., Running], tmp_path: Path) -> Callable[..., Running]:
    """Starts monitors on one store, one after the other."""
    return lambda **settings: run(store=str(tmp_path / "store" / "monitor.db"), **settings)


def test_a_finding_is_stored_at_once_and_the_trace_with_those_that_follow(
    start: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "FINDING_SECONDS", 3600.0)
    monitor, file = start(), tmp_path / "store" / "monitor.db"
    kept = "SELECT state, length(trace) > 100 FROM requests ORDER BY serial"
    begun, ended = (monitor_pb2.REQUEST_STATE_RUNNING, 0), (monitor_pb2.REQUEST_STATE_FINISHED, 1)
    stream = subscribe(monitor.api)
    first, *before, end = Engine().request("found-aaaaaaaa", SHIFTING)
    monitor.publish([first])
    until(lambda: stored(file, kept) == [begun])
    monitor.publish(before)
    assert next(stream).event.external_id == "found"
    assert stored(file, "SELECT count(*) FROM events") == [(1,)]
    # When one that ended later is there, all was looked at that was to be stored then.
    monitor.publish(Engine().request("later-bbbbbbbb", [FIRST] * 2))
    until(lambda: stored(file, kept)[1:] == [ended])
    assert stored(file, kept) == [begun, ended]
    monitor.publish([end])
    until(lambda: stored(file, kept) == [ended, ended])


def test_traces_that_left_the_memory_are_read_from_the_store(start: Callable[..., Running]) -> None:
    monitor = start(max_traces=3)
    rank = Engine()
    for index in range(12):
        monitor.publish(rank.request(f"chatcmpl-r{index}-aaaaaaaa", [FIRST]))
    assert len(monitor.server.store) == 3
    until(lambda: monitor.metric("stream_monitor_store_written_total", record="trace") >= 12)
    every = [f"chatcmpl-r{index}" for index in reversed(range(12))]
    assert names(monitor.api) == every
    pages, token = [], ""
    while True:
        page = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest(page_size=5, page_token=token))
        pages.append([info.external_id for info in page.requests])
        token = page.next_page_token
        if not token:
            break
    assert pages == [every[:5], every[5:10], every[10:]]
    assert names(monitor.api, request_id="r1") == ["chatcmpl-r1"]
    assert names(monitor.api, request_id="r11") == ["chatcmpl-r11"]
    assert names(monitor.api, request_id="none") == []
    assert names(monitor.api, model_name="tiny", engine="0") == every
    assert names(monitor.api, model_name="other") == names(monitor.api, engine="1") == []
    trace = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="r0"))
    assert (trace.info.external_id, len(trace.sentences)) == ("chatcmpl-r0", 9)


def test_an_ambiguous_id_is_told_from_memory_and_store_together(start: Callable[..., Running]) -> None:
    monitor = start(max_traces=1)
    for _ in range(2):
        monitor.publish(Engine().request("same-aaaaaaaa", [FIRST]))
    monitor.publish(Engine().request("3_same-bbbbbbbb", [FIRST]))
    until(lambda: len(names(monitor.api, request_id="same")) == 3)
    with pytest.raises(grpc.RpcError) as error:
        monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="same"))
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.value.details().count("engine_instance=") == 3
    chosen = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="same", sample_index=3))
    assert chosen.info.key.request_id == "3_same-bbbbbbbb"


def test_a_request_evicted_while_it_runs_is_cut(start: Callable[..., Running]) -> None:
    monitor = start(max_traces=1)
    rank = Engine()
    monitor.publish([rank.summary(started=[started("a-aaaaaaaa")])])
    monitor.publish([rank.summary(started=[started("b-bbbbbbbb")])])
    until(lambda: names(monitor.api) == ["b", "a"])
    states = [info.state for info in monitor.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests]
    assert states == [monitor_pb2.REQUEST_STATE_RUNNING, monitor_pb2.REQUEST_STATE_CUT]
