"""From summaries over a real socket to lists, traces and events."""

import threading
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from stream_monitor.monitor import store
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2
from tests.monitor.conftest import Running, Stream, until
from tests.monitor.synthetic import Engine, Look, engine, finished, started, tokens

CHAT = "chatcmpl-my-req-1-aee6d49e"
SHIFTING = [4] * 14 + [30] * 8
"""A request whose sentences rest on prompt sentence 0, then on prompt sentence 5."""
ALL_KINDS = [kind for kind in monitor_pb2.EventKind.values() if kind]


def trace(monitor: Running, request_id: str) -> monitor_pb2.GetTraceResponse:
    return monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id=request_id))


def matrix(response: monitor_pb2.GetTraceResponse) -> np.ndarray:
    size = len(response.sentences)
    dense = np.zeros((size, size))
    rows, columns = (np.frombuffer(raw, "<u4") for raw in (response.matrix_row, response.matrix_column))
    dense[rows, columns] = np.frombuffer(response.matrix_share, "<f4")
    return dense


def test_a_request_is_traced_from_start_to_finish(monitor: Running) -> None:
    answers = monitor.publish(Engine().request(CHAT, [4, 4, 4, 4, 4, 20]))
    assert [answer.sequence for answer in answers] == list(range(1, len(answers) + 1))
    assert {answer.outcome for answer in answers} == {1}
    listed = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests
    assert [info.external_id for info in listed] == ["chatcmpl-my-req-1"]
    info = listed[0]
    assert (info.prompt_tokens, info.output_tokens, info.sentences, info.rows_kept) == (48, 36, 14, 18)
    assert info.state == monitor_pb2.REQUEST_STATE_FINISHED

    response = trace(monitor, "chatcmpl-my-req-1")
    assert [(s.first_token, s.end_token) for s in response.sentences] == [(i * 6, i * 6 + 6) for i in range(14)]
    roles = [summary_pb2.ROLE_SYSTEM] * 4 + [summary_pb2.ROLE_USER] * 4 + [summary_pb2.ROLE_REASONING] * 6
    assert [s.role for s in response.sentences] == roles
    dense = matrix(response)
    unobserved = np.frombuffer(response.unobserved_share, "<f4")
    assert np.allclose(dense[8:].sum(axis=1) + unobserved[8:], 1, atol=2e-3)
    assert np.isnan(unobserved[:8]).all()
    assert dense[8:13, 0] == pytest.approx([0.5] * 5, abs=1e-3)
    assert dense[13, 3] == pytest.approx(0.5, abs=1e-3)
    assert np.frombuffer(response.captured_rows, "<u4").tolist() == [0] * 8 + [3] * 6
    vertical = np.frombuffer(response.vertical_score, "<f4")
    assert vertical[0] == pytest.approx(5 / 6 * 0.5, abs=1e-3)
    assert np.isnan(vertical[10:]).all()
    positions = np.frombuffer(response.row_positions, "<u4").tolist()
    assert positions == [48 + 6 * i + o for i in range(6) for o in (0, 2, 4)]


def test_the_share_of_learned_sinks_is_given_to_no_sentence(monitor: Running) -> None:
    rank = Engine()
    looks = [Look(CHAT, 48 + offset, target=4, share=0.3, sink=0.4) for offset in (0, 2, 4)]
    messages = [
        rank.summary(started=[started(CHAT)]),
        rank.summary(tokens=[tokens(CHAT, 48)]),
        *[rank.summary([look]) for look in looks],
        rank.summary(finished=[finished(CHAT, 54)]),
    ]
    assert {answer.outcome for answer in monitor.publish(messages)} == {1}
    response = trace(monitor, CHAT)
    last = matrix(response)[8]
    assert last[0] == pytest.approx(0.3, abs=1e-3)
    assert last.sum() == pytest.approx(1 - 0.4 - 0.1, abs=2e-3)
    assert np.frombuffer(response.unobserved_share, "<f4")[8] == pytest.approx(0.1, abs=1e-3)


def test_the_anchor_shift_is_found_where_it_happens(monitor: Running) -> None:
    stream = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(request_ids=["my-req-1"]))
    assert not next(stream).HasField("event")
    monitor.publish(Engine().request(CHAT, SHIFTING))
    event = next(stream).event
    assert event.kind == monitor_pb2.EVENT_KIND_ANCHOR_SHIFT
    assert event.severity == monitor_pb2.SEVERITY_WARNING
    assert event.sentence.index in (8 + 14, 8 + 15)
    assert event.from_anchors[0].sentence.index == 0
    assert event.to_anchors[0].sentence.index == 5
    assert event.score > event.threshold > 0
    assert (event.external_id, event.key.request_id) == ("chatcmpl-my-req-1", CHAT)
    assert event.unobserved_share == pytest.approx(0.1, abs=1e-3)
    assert trace(monitor, CHAT).events[0] == event
    assert monitor.metric("stream_monitor_events_total", kind="ANCHOR_SHIFT") == 1
    stream.cancel()


def test_a_steady_request_raises_nothing(monitor: Running) -> None:
    monitor.publish(Engine().request(CHAT, [4] * 30))
    assert not trace(monitor, CHAT).events
    assert monitor.metric("stream_monitor_verdicts_total", kind="anchor_shift", verdict="steady") > 15


def test_sparse_rows_abstain(monitor: Running) -> None:
    rank = Engine()
    summaries = [rank.summary(started=[started(CHAT)])]
    for index in range(6):
        summaries.append(rank.summary(tokens=[tokens(CHAT, 48 + 6 * index)]))
        summaries.append(rank.summary([Look(CHAT, 48 + 6 * index)]))
    monitor.publish([*summaries, rank.summary(finished=[finished(CHAT, 84)])])
    assert monitor.metric("stream_monitor_verdicts_total", kind="anchor_shift", verdict="insufficient") == 6


def test_progress_events_come_only_when_asked_for(monitor: Running) -> None:
    every = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(kinds=ALL_KINDS))
    findings = monitor.api.Subscribe(monitor_pb2.SubscribeRequest())
    next(every), next(findings)
    monitor.publish(Engine().request(CHAT, SHIFTING))
    kinds = []
    while not kinds or kinds[-1] != monitor_pb2.EVENT_KIND_REQUEST_FINISHED:
        kinds.append(next(every).event.kind)
    assert kinds[0] == monitor_pb2.EVENT_KIND_REQUEST_STARTED
    assert kinds.count(monitor_pb2.EVENT_KIND_SENTENCE_CLOSED) == len(SHIFTING)
    assert next(findings).event.kind == monitor_pb2.EVENT_KIND_ANCHOR_SHIFT
    every.cancel(), findings.cancel()


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ({"model_names": ["tiny"]}, True),
        ({"model_names": ["other"]}, False),
        ({"engines": ["0"]}, True),
        ({"engines": ["1"]}, False),
        ({"request_ids": [CHAT]}, True),
        ({"request_ids": ["my-req-2"]}, False),
        ({"minimum_severity": monitor_pb2.SEVERITY_WARNING}, True),
        ({"minimum_severity": monitor_pb2.SEVERITY_CRITICAL}, False),
        ({"kinds": [monitor_pb2.EVENT_KIND_ANCHOR_LOCK]}, False),
    ],
)
def test_subscription_filters(monitor: Running, filters: dict, passes: bool) -> None:
    # Two subscriptions on one connection: what the marker overtakes was not wanted.
    stream = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(**filters))
    cursor = next(stream).cursor
    monitor.publish(Engine().request(CHAT, SHIFTING))
    if passes:
        assert next(stream).event.external_id == "chatcmpl-my-req-1"
    else:
        late = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(cursor=cursor, **filters))
        next(late)
        monitor.call(monitor.server.stop())
        monitor.stopped = True
        with pytest.raises(grpc.RpcError) as ended:
            next(late)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    stream.cancel()


def test_a_subscription_resumes_by_cursor(monitor: Running) -> None:
    first = monitor.api.Subscribe(monitor_pb2.SubscribeRequest())
    next(first)
    rank = Engine()
    monitor.publish(rank.request("a-aaaaaaaa", SHIFTING))
    cursor = next(first).cursor
    first.cancel()
    monitor.publish(rank.request("b-bbbbbbbb", SHIFTING) + rank.request("c-cccccccc", SHIFTING))
    again = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(cursor=cursor))
    assert next(again).cursor == cursor
    assert [next(again).event.external_id for _ in range(2)] == ["b", "c"]
    again.cancel()


def test_a_cursor_that_is_gone_names_the_oldest_held(run: Callable[..., Running]) -> None:
    monitor = run(event_log=2)
    stream = monitor.api.Subscribe(monitor_pb2.SubscribeRequest())
    start = next(stream).cursor
    rank = Engine()
    for name in "abc":
        monitor.publish(rank.request(f"{name}-aaaaaaaa", SHIFTING))
    gone = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(cursor=start))
    with pytest.raises(grpc.RpcError) as error:
        next(gone)
    assert error.value.code() is grpc.StatusCode.OUT_OF_RANGE
    oldest = error.value.details().rsplit(" ", 1)[1]
    held = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(cursor=oldest))
    next(held)
    assert [next(held).event.external_id for _ in range(2)] == ["b", "c"]
    stream.cancel(), held.cancel()


@pytest.mark.parametrize(
    ("cursor", "status"),
    [("!!!", grpc.StatusCode.INVALID_ARGUMENT), ("YWJjOjA=", grpc.StatusCode.OUT_OF_RANGE)],
)
def test_foreign_cursors_are_refused(monitor: Running, cursor: str, status: grpc.StatusCode) -> None:
    with pytest.raises(grpc.RpcError) as error:
        next(monitor.api.Subscribe(monitor_pb2.SubscribeRequest(cursor=cursor)))
    assert error.value.code() is status


def test_too_many_subscribers_are_refused(run: Callable[..., Running]) -> None:
    monitor = run(max_subscribers=1)
    first = monitor.api.Subscribe(monitor_pb2.SubscribeRequest())
    next(first)
    with pytest.raises(grpc.RpcError) as error:
        next(monitor.api.Subscribe(monitor_pb2.SubscribeRequest()))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    first.cancel()


def test_a_slow_subscriber_loses_the_oldest_and_is_told(run: Callable[..., Running]) -> None:
    monitor = run(subscriber_queue=4)
    stream = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(kinds=ALL_KINDS))
    next(stream)
    # The transport buffers much before a reader who pauses is felt here; the queue itself is what is under test.
    (subscriber,) = monitor.server.log.subscribers

    def flood() -> None:
        for index in range(10):
            monitor.server.log.publish(monitor_pb2.Event(kind=monitor_pb2.EVENT_KIND_ANCHOR_SHIFT, summary=str(index)))

    monitor.loop.call_soon_threadsafe(flood)
    responses = [next(stream) for _ in range(4)]
    assert [response.event.summary for response in responses] == ["6", "7", "8", "9"]
    assert [response.lost for response in responses] == [6, 0, 0, 0]
    assert subscriber.lost == 0
    assert monitor.metric("stream_monitor_subscriber_events_lost_total") == 6
    stream.cancel()


def test_ids_as_the_client_knows_them_find_the_request(monitor: Running) -> None:
    rank = Engine()
    for internal in (
        CHAT,
        "cmpl-xyz-0-aee6d49e",
        "cmpl-xyz-1-bee6d49e",
        "0_chatcmpl-n-cee6d49e",
        "1_chatcmpl-n-cee6d49e",
    ):
        monitor.publish([rank.summary(started=[started(internal)])])

    def found(request_id: str) -> list[str]:
        response = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest(request_id=request_id))
        return [info.key.request_id for info in response.requests]

    assert found("chatcmpl-my-req-1") == found("my-req-1") == found(CHAT) == [CHAT]
    assert found("cmpl-xyz") == found("xyz") == ["cmpl-xyz-1-bee6d49e", "cmpl-xyz-0-aee6d49e"]
    assert found("cmpl-xyz-1") == ["cmpl-xyz-1-bee6d49e"]
    assert found("chatcmpl-n") == ["1_chatcmpl-n-cee6d49e", "0_chatcmpl-n-cee6d49e"]
    assert found("nothing") == []
    with pytest.raises(grpc.RpcError) as ambiguous:
        trace(monitor, "chatcmpl-n")
    assert ambiguous.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "sample_index=1" in ambiguous.value.details()
    one = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="chatcmpl-n", sample_index=1))
    assert one.info.key.sample_index == 1
    with pytest.raises(grpc.RpcError) as unknown:
        trace(monitor, "nothing")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_lists_come_in_pages_newest_first(monitor: Running) -> None:
    rank = Engine()
    monitor.publish([rank.summary(started=[started(f"r{index}") for index in range(7)])])
    names, token = [], ""
    while True:
        page = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest(page_size=3, page_token=token))
        names += [info.external_id for info in page.requests]
        token = page.next_page_token
        if not token:
            break
    assert names == [f"r{index}" for index in reversed(range(7))]
    for bad in ({"page_size": 1001}, {"page_token": "?"}):
        with pytest.raises(grpc.RpcError) as error:
            monitor.api.ListRequests(monitor_pb2.ListRequestsRequest(**bad))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_oldest_finished_trace_makes_room(run: Callable[..., Running]) -> None:
    monitor = run(max_traces=3)
    rank = Engine()
    monitor.publish([rank.summary(started=[started("runs")])])
    for name in "abc":
        monitor.publish(rank.request(name, [4]))
    listed = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests
    assert [info.external_id for info in listed] == ["c", "b", "runs"]
    assert monitor.metric("stream_monitor_traces_evicted_total", limit="count") == 1


def test_the_engine_that_has_most_makes_room(run: Callable[..., Running]) -> None:
    monitor = run(max_traces=4)
    quiet, busy = Engine(), Engine()
    monitor.publish(quiet.request("old", [4]))
    monitor.publish([quiet.summary(started=[started("older")])])
    for name in "abcdef":
        monitor.publish(busy.request(name, [4]))
    listed = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests
    assert [info.external_id for info in listed] == ["f", "e", "older", "old"]


def test_running_requests_beyond_an_engine_s_share_are_refused_and_counted(run: Callable[..., Running]) -> None:
    monitor = run(max_requests_per_engine=2)
    busy, other = Engine(), Engine()
    monitor.publish([busy.summary(started=[started(name) for name in "abc"])])
    rows = busy.summary([Look("a", 48), Look("c", 48), Look("d", 48)], tokens=[tokens("c", 48), tokens("d", 48)])
    monitor.publish([rows])
    monitor.publish(other.request("e", [4]))
    listed = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests
    assert {info.external_id for info in listed} == {"a", "b", "e"}
    assert monitor.metric("stream_monitor_requests_refused_total", reason="engine_quota") == 1
    lost = monitor.metric("stream_monitor_rows_total", outcome="discarded", reason="engine_quota")
    assert lost == 2 * busy.heads
    monitor.publish([busy.summary(finished=[finished("a", 54)])])
    monitor.publish(busy.request("f", [4]))
    listed = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests
    assert {info.external_id for info in listed} == {"a", "b", "e", "f"}


def test_memory_is_bounded(run: Callable[..., Running]) -> None:
    monitor = run()
    monitor.server.store.max_bytes = 1 << 16
    rank = Engine()
    for index in range(12):
        monitor.publish(rank.request(f"r{index}", [4] * 12))
    assert 0 < monitor.metric("stream_monitor_traces_bytes") <= 1 << 16
    assert monitor.metric("stream_monitor_traces_evicted_total", limit="bytes") > 3
    assert monitor.server.store.bytes == sum(t.bytes for t in monitor.server.store.newest_first())


def test_rows_before_the_start_make_a_late_trace(monitor: Running) -> None:
    rank = Engine()
    monitor.publish([rank.summary([Look("late", 100)]), rank.summary(tokens=[tokens("late", 101)])])
    response = trace(monitor, "late")
    assert [(s.first_token, s.end_token, s.role) for s in response.sentences] == [(0, 101, 0)]
    assert response.info.rows_kept == 1
    assert monitor.metric("stream_monitor_traces_late_total") == 1


def test_rows_inside_a_prompt_say_what_its_sentences_read(monitor: Running) -> None:
    rank, chunk = Engine(), summary_pb2.PHASE_PREFILL_CHUNK
    # Of two chunks; the second sentence from the end of the first chunk has two rows.
    first = [Look("p", 13, 2, 0.5, phase=chunk), Look("p", 18, 2, 0.6, phase=chunk), Look("p", 23, 2, 0.2, phase=chunk)]
    second = [Look("p", 40, 14, 0.4, phase=chunk), Look("p", 47, 20, 0.4, phase=summary_pb2.PHASE_PREFILL_END)]
    monitor.publish([rank.summary(first, started=[started("p")]), rank.summary(second)])
    monitor.publish([rank.summary(tokens=[tokens("p", 48)]), rank.summary(finished=[finished("p", 54)])])
    found = trace(monitor, "p")
    assert np.frombuffer(found.captured_rows, "<u4").tolist() == [0, 0, 1, 2, 0, 0, 1, 1, 0]
    read = {(2, 0): 0.5, (3, 0): 0.4, (6, 2): 0.4, (7, 3): 0.4}
    assert {place: matrix(found)[place] for place in read} == pytest.approx(read, abs=0.01)
    assert np.frombuffer(found.row_positions, "<u4").tolist() == [47], "from which a token was sampled"
    assert monitor.metric("stream_monitor_rows_total", phase="chunk", outcome="discarded") == 0


def test_a_restarted_engine_is_another_trace(monitor: Running) -> None:
    monitor.publish(Engine().request("same", [4]))
    second = Engine()
    monitor.publish(second.request("same", [4]))
    with pytest.raises(grpc.RpcError) as ambiguous:
        trace(monitor, "same")
    assert ambiguous.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    chosen = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="same", engine_instance=second.info.instance))
    assert chosen.info.key.engine_instance == second.info.instance


def test_two_ranks_merged_equal_one_rank_with_all_heads(run: Callable[..., Running], tmp_path) -> None:
    whole = run(ingest=f"unix:{tmp_path / 'whole.sock'}")
    split = run(ingest=f"unix:{tmp_path / 'split.sock'}")
    generator = np.random.default_rng(5)
    targets = [generator.integers(0, 40, (2, 4)) for _ in range(9)]

    def looks(heads: slice) -> list[Look]:
        return [Look("r", 48 + 2 * index, by_head=target[:, heads]) for index, target in enumerate(targets)]

    def send(monitor: Running, ranks: list[tuple[Engine, slice]]) -> None:
        streams = []
        for rank, heads in ranks:
            summaries = [rank.summary([look]) for look in looks(heads)]
            if rank.info.tensor_parallel_rank == 0:
                summaries.insert(0, rank.summary(sequence=100, started=[started("r")]))
                summaries.append(rank.summary(tokens=[tokens("r", 48 + 6 * i) for i in range(3)]))
                summaries.append(rank.summary(finished=[finished("r", 66)]))
            for number, summary in enumerate(summaries):
                summary.sequence = number + 1
            streams.append(threading.Thread(target=monitor.publish, args=(summaries,)))
        for stream in streams:
            stream.start()
        for stream in streams:
            stream.join()

    send(whole, [(Engine(engine(heads=range(4))), slice(0, 4))])
    instance = engine().instance
    parts = [
        Engine(
            engine(instance, heads=(0, 1), tensor_parallel_size=2, tensor_parallel_rank=rank, first_query_head=2 * rank)
        )
        for rank in (0, 1)
    ]
    send(split, [(parts[0], slice(0, 2)), (parts[1], slice(2, 4))])
    one, two = trace(whole, "r"), trace(split, "r")
    assert np.allclose(matrix(one), matrix(two), atol=1e-6)
    assert matrix(one).any()
    assert one.captured_rows == two.captured_rows
    assert (two.info.rows_kept, list(two.info.missing_ranks)) == (9, [])
    assert split.metric("stream_monitor_steps_total", result="complete") == 9


def test_a_rank_that_sees_no_tokens_decides_neither_prompt_nor_end(monitor: Running) -> None:
    instance = engine().instance
    first, second = (
        Engine(engine(instance, tensor_parallel_size=2, tensor_parallel_rank=rank, first_query_head=2 * rank))
        for rank in (0, 1)
    )
    blind = summary_pb2.RequestStarted(request_id="r", prompt_tokens=48)
    monitor.publish([second.summary(started=[blind])])
    assert [s.end_token for s in trace(monitor, "r").sentences] == [48]
    monitor.publish([first.summary(started=[started("r")]), first.summary(tokens=[tokens("r", 48)])])
    looks = [Look("r", 48), Look("r", 52)]
    monitor.publish([second.summary(looks), second.summary(finished=[finished("r", 48)])])
    monitor.publish([first.summary(looks), first.summary(finished=[finished("r", 54)])])
    response = trace(monitor, "r")
    assert [s.end_token for s in response.sentences] == [6 * i + 6 for i in range(9)]
    assert {s.role for s in response.sentences[:8]} == {summary_pb2.ROLE_SYSTEM, summary_pb2.ROLE_USER}
    assert (response.info.state, response.info.rows_kept) == (monitor_pb2.REQUEST_STATE_FINISHED, 2)
    assert monitor.metric("stream_monitor_requests_started_total") == 1


def test_a_missing_rank_makes_steps_partial_after_the_deadline(run: Callable[..., Running]) -> None:
    monitor = run(merge_deadline_seconds=0.1)
    rank = Engine(engine(tensor_parallel_size=2))
    stream = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(kinds=[monitor_pb2.EVENT_KIND_REQUEST_FINISHED]))
    next(stream)
    monitor.publish(rank.request("r", [4]))
    next(stream)
    info = trace(monitor, "r").info
    assert (list(info.missing_ranks), info.rows_kept) == (["tp1"], 3)
    assert monitor.metric("stream_monitor_steps_total", result="partial") == 3
    stream.cancel()


def test_a_fault_of_ours_does_not_end_the_letting_go_of_late_steps(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = run(merge_deadline_seconds=0.1)
    flush, faults = monitor.server.intake.flush, iter([ValueError("a fault of ours")] * 2)

    def faulty() -> None:
        for fault in faults:
            raise fault
        flush()

    monkeypatch.setattr(monitor.server.intake, "flush", faulty)
    monitor.publish(Engine(engine(tensor_parallel_size=2)).request("r", [4]))
    until(lambda: monitor.metric("stream_monitor_steps_total", result="partial") == 3)
    assert len([record for record in caplog.records if "letting go" in record.getMessage()]) == 1


def test_requests_of_an_engine_that_is_gone_are_cut_until_it_is_back(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "GONE_SECONDS", 0.2)
    monitor, rank = run(), Engine()
    monitor.publish([rank.summary(started=[started("done")]), rank.summary(finished=[finished("done", 48)])])
    monitor.publish([rank.summary(started=[started("runs")])])

    def states() -> list[str]:
        listed = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests
        return [monitor_pb2.RequestState.Name(info.state).removeprefix("REQUEST_STATE_") for info in listed]

    until(lambda: states() == ["CUT", "FINISHED"])
    back = Stream(monitor)
    back.send(rank.summary([Look("runs", 48)]))
    until(lambda: states() == ["RUNNING", "FINISHED"])
    back.close()
    until(lambda: states() == ["CUT", "FINISHED"])


def test_sentences_beyond_the_limit_are_counted(run: Callable[..., Running]) -> None:
    monitor = run(max_sentences=16)
    monitor.publish(Engine().request("r", [4] * 12))
    assert trace(monitor, "r").info.sentences == 16
    assert monitor.metric("stream_monitor_sentences_dropped_total") == 4
    assert monitor.metric("stream_monitor_rows_total", outcome="discarded", reason="sentence_limit") == 4 * 3 * 4
