"""What Publish does with bad, repeated and late messages, and that the account of rows stays exact."""

import itertools
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_monitor.monitor import store
from stream_monitor.v1alpha1 import ingest_pb2, monitor_pb2, summary_pb2
from tests.monitor.conftest import Running, Stream, until
from tests.monitor.synthetic import Engine, Look, engine, finished, started, tokens

ACCEPTED, DUPLICATE, REFUSED = 1, 2, 3


def good() -> summary_pb2.StepSummary:
    """A summary with a bit of everything."""
    return Engine().summary(
        [Look("r", 48), Look("r", 50)],
        started=[started("r")],
        tokens=[tokens("r", 48)],
        finished=[finished("r", 54)],
        audits=[summary_pb2.Audit(row=0, layer=3, query_head=0, recall=0.9)],
    )


def changed(**changes: object) -> Callable[[], summary_pb2.StepSummary]:
    """A good summary with fields overwritten by dotted path (`__` for the dot)."""

    def make() -> summary_pb2.StepSummary:
        summary = good()
        for path, value in changes.items():
            *parents, name = path.split("__")
            where: object = summary
            for parent in parents:
                where = where[int(parent)] if parent.isdigit() else getattr(where, parent)  # type: ignore[index]
            if isinstance(value, list):
                del getattr(where, name)[:]
                getattr(where, name).extend(value)
            else:
                setattr(where, name, value)
        return summary

    return make


NAN, ZERO = np.array([np.nan], "<f2").tobytes(), np.array([0.0], "<f2").tobytes()
ROW_HEADS = 2 * 4
"""Rows x layers x heads of the good summary."""
Cell = summary_pb2.RowCount
Status = grpc.StatusCode

BAD = {
    "no_summary": (lambda: None, Status.INVALID_ARGUMENT, "malformed"),
    "version_0": (changed(schema_version=0), Status.FAILED_PRECONDITION, "schema_version"),
    "version_3": (changed(schema_version=3), Status.FAILED_PRECONDITION, "schema_version"),
    "no_sequence": (changed(sequence=0), Status.INVALID_ARGUMENT, "value"),
    "no_step": (changed(step=0), Status.INVALID_ARGUMENT, "value"),
    "no_instance": (changed(engine__instance=""), Status.INVALID_ARGUMENT, "engine"),
    "no_model": (changed(engine__model_name=""), Status.INVALID_ARGUMENT, "engine"),
    "rank_beyond_size": (changed(engine__tensor_parallel_rank=1), Status.INVALID_ARGUMENT, "engine"),
    "size_zero": (changed(engine__pipeline_parallel_size=0), Status.INVALID_ARGUMENT, "engine"),
    "layers_descend": (changed(engine__layers=[5, 3]), Status.INVALID_ARGUMENT, "engine"),
    "heads_beyond": (changed(engine__query_heads=[0, 8]), Status.INVALID_ARGUMENT, "engine"),
    "block_size_zero": (changed(engine__geometry__block_size=0), Status.INVALID_ARGUMENT, "engine"),
    "top_k_huge": (changed(engine__geometry__top_k=1 << 31), Status.INVALID_ARGUMENT, "engine"),
    "too_many_rows": (changed(rows__count=5000), Status.INVALID_ARGUMENT, "limit"),
    "ids_missing": (changed(rows__request_ids=["r"]), Status.INVALID_ARGUMENT, "shape"),
    "id_empty": (changed(rows__request_ids=["r", ""]), Status.INVALID_ARGUMENT, "value"),
    **{
        f"short_{name}": (changed(**{f"rows__{name}": b"\0"}), Status.INVALID_ARGUMENT, "shape")
        for name in summary_pb2.Rows.DESCRIPTOR.fields_by_name
        if name not in ("count", "request_ids")
    },
    "block_ids_missing": (changed(rows__narrow_block_ids=b""), Status.INVALID_ARGUMENT, "shape"),
    "block_ids_twice": (changed(rows__block_ids=bytes(4 * 4 * ROW_HEADS)), Status.INVALID_ARGUMENT, "shape"),
    "phase_unknown": (changed(rows__phases=b"\x03\x07"), Status.INVALID_ARGUMENT, "value"),
    "position_huge": (changed(rows__positions=b"\xff" * 8), Status.INVALID_ARGUMENT, "limit"),
    "nan": (changed(rows__unobserved_log_share=NAN * ROW_HEADS), Status.INVALID_ARGUMENT, "value"),
    "sum_above_1": (changed(rows__unobserved_log_share=ZERO * ROW_HEADS), Status.INVALID_ARGUMENT, "value"),
    "sum_below_1": (
        changed(rows__forced_log_share=np.full(ROW_HEADS * 3, -np.inf, "<f2").tobytes()),
        Status.INVALID_ARGUMENT,
        "value",
    ),
    "sink_above_1": (changed(rows__learned_sink_log_share=ZERO * ROW_HEADS), Status.INVALID_ARGUMENT, "value"),
    "block_beyond": (
        changed(rows__block_log_share=ZERO * ROW_HEADS * 4),
        Status.INVALID_ARGUMENT,
        "value",
    ),
    "lse_infinite": (
        changed(rows__total_lse=np.full(ROW_HEADS, np.inf, "<f4").tobytes()),
        Status.INVALID_ARGUMENT,
        "value",
    ),
    "flags_short": (changed(started__0__prompt_tokens=49), Status.INVALID_ARGUMENT, "shape"),
    "roles_uneven": (changed(started__0__roles=b"\x01"), Status.INVALID_ARGUMENT, "shape"),
    "role_unknown": (changed(started__0__roles=b"\x01\x09"), Status.INVALID_ARGUMENT, "value"),
    "role_beyond": (
        changed(started__0__role_starts=np.array([0, 48], "<u4").tobytes()),
        Status.INVALID_ARGUMENT,
        "value",
    ),
    "token_ids_short": (changed(tokens__0__token_ids=b"\1"), Status.INVALID_ARGUMENT, "shape"),
    "tokens_huge": (changed(tokens__0__first_position=(1 << 32) - 1), Status.INVALID_ARGUMENT, "limit"),
    "total_huge": (changed(finished__0__total_tokens=(1 << 32) - 1), Status.INVALID_ARGUMENT, "limit"),
    "id_too_long": (changed(finished__0__request_id="x" * 2000), Status.INVALID_ARGUMENT, "value"),
    "outcome_unknown": (changed(ledger__token_rows=[Cell(outcome="gone")]), Status.INVALID_ARGUMENT, "value"),
    "reason_bad": (
        changed(ledger__token_rows=[Cell(outcome="dropped", reason="A b")]),
        Status.INVALID_ARGUMENT,
        "value",
    ),
    "cell_twice": (changed(ledger__chunk_rows=[Cell(outcome="raced")] * 2), Status.INVALID_ARGUMENT, "value"),
    "recall_nan": (changed(audits__0__recall=float("nan")), Status.INVALID_ARGUMENT, "value"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_message_ends_its_own_stream_with_a_name(shared_monitor: Running, name: str) -> None:
    monitor = shared_monitor
    make, status, reason = BAD[name]
    before = monitor.metric("stream_monitor_messages_total", outcome="invalid", reason=reason)
    other, bystander = Stream(monitor), Engine()
    assert other.send(bystander.summary(started=[started("fine")])).outcome == ACCEPTED
    summary = make()
    with pytest.raises(grpc.RpcError) as error:
        monitor.publish_raw([ingest_pb2.PublishRequest(summary=summary).SerializeToString()])
    assert error.value.code() is status
    assert error.value.details()
    assert monitor.metric("stream_monitor_messages_total", outcome="invalid", reason=reason) == before + 1
    assert other.send(bystander.summary([Look("fine", 48)])).outcome == ACCEPTED
    other.close()


def test_the_good_message_behind_the_bad_ones_is_good(monitor: Running) -> None:
    assert [answer.outcome for answer in monitor.publish([good()])] == [ACCEPTED]


def test_bytes_that_are_no_message(monitor: Running) -> None:
    for raw in (b"\xff\xff\xff", b"\x0a\x04\x12\x02\x0a\xff"):
        with pytest.raises(grpc.RpcError) as error:
            monitor.publish_raw([raw])
        assert error.value.code() is Status.INVALID_ARGUMENT
    assert monitor.metric("stream_monitor_messages_total", reason="malformed") == 2


def test_an_oversized_message_is_named_with_the_limit(run: Callable[..., Running]) -> None:
    monitor = run(max_message_bytes=1 << 16)
    other, bystander = Stream(monitor), Engine()
    other.send(bystander.summary())
    for size in ((1 << 16) + 1, 1 << 24):
        with pytest.raises(grpc.RpcError) as error:
            monitor.publish_raw([b"\0" * size])
        assert error.value.code() is Status.RESOURCE_EXHAUSTED
    assert monitor.metric("stream_monitor_messages_total", outcome="invalid", reason="oversized") == 2
    other.send(bystander.summary())
    other.close()


def test_sequences_must_ascend_on_a_stream(monitor: Running) -> None:
    rank = Engine()
    first, second = rank.summary(), rank.summary()
    with pytest.raises(grpc.RpcError) as error:
        monitor.publish([second, first])
    assert error.value.code() is Status.OUT_OF_RANGE
    assert "1 after 2" in error.value.details()
    assert monitor.metric("stream_monitor_messages_total", reason="out_of_order") == 1


def test_what_is_sent_again_after_a_reconnection_counts_once(monitor: Running) -> None:
    rank = Engine()
    summaries = rank.request("r", [4, 4])
    monitor.publish(summaries[:4])
    answers = monitor.publish(summaries[2:])
    assert [a.outcome for a in answers] == [DUPLICATE] * 2 + [ACCEPTED] * (len(summaries) - 4)
    assert monitor.metric("stream_monitor_rows_total", outcome="captured") == 6 * rank.heads
    assert monitor.metric("stream_monitor_messages_lost_total") == 0


def test_a_gap_in_the_sequence_is_counted(monitor: Running) -> None:
    rank = Engine()
    first = rank.summary()
    rank.sequence += 4
    monitor.publish([first, rank.summary()])
    assert monitor.metric("stream_monitor_messages_lost_total") == 4


def test_a_rank_may_not_change_its_description(monitor: Running) -> None:
    rank = Engine()
    monitor.publish([rank.summary()])
    summary = rank.summary()
    summary.engine.model_name = "another"
    with pytest.raises(grpc.RpcError) as error:
        monitor.publish([summary])
    assert error.value.code() is Status.INVALID_ARGUMENT


def test_ranks_beyond_the_limit_are_refused_and_stopped_ones_make_room(run: Callable[..., Running]) -> None:
    monitor = run(max_engines=1)
    first, stream = Engine(), Stream(monitor)
    stream.send(first.summary([Look("r", 48)]))
    (answer,) = monitor.publish([Engine().summary()])
    assert (answer.outcome, answer.reason) == (REFUSED, "too_many_ranks")
    stream.close()
    second = Engine()
    (answer,) = monitor.publish([second.summary([Look("r", 48)])])
    assert answer.outcome == ACCEPTED
    # The first rank's rows are still in the sum, and it cannot come back to be counted twice.
    assert monitor.metric("stream_monitor_rows_total", outcome="captured") == 2 * second.heads
    (answer,) = monitor.publish([first.summary()])
    assert (answer.outcome, answer.reason) == (REFUSED, "rank_retired")


def test_rows_in_hand_of_an_engine_that_is_gone_are_dropped_by_name_and_counted_once_if_it_comes_back(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "GONE_SECONDS", 0.2)
    monitor, rank = run(), Engine()

    def message(captured: int) -> summary_pb2.StepSummary:
        """Of a rank that expects 100, of which so many have arrived and none was left out."""
        cells = [summary_pb2.RowCount(outcome=o, count=n) for o, n in (("expected", 100), ("captured", captured))]
        return rank.summary(ledger=summary_pb2.Ledger(token_rows=cells))

    def told(outcome: str) -> float:
        return monitor.metric("stream_monitor_rows_total", outcome=outcome)

    stream = Stream(monitor)
    stream.send(message(90))
    assert account(monitor) == (100, 90)
    stream.close()
    until(lambda: account(monitor) == (100, 100))
    assert monitor.metric("stream_monitor_rows_total", outcome="dropped", reason="engine_silent") == 10
    assert told("captured") == 90
    monitor.publish([message(96)])
    assert (account(monitor), told("captured"), told("dropped")) == ((100, 100), 90, 10)


def test_ranks_of_one_engine_beyond_its_share_are_refused_and_others_are_taken_in(run: Callable[..., Running]) -> None:
    monitor = run(max_ranks_per_engine=2)
    instance = engine().instance
    answers = [
        monitor.publish([Engine(engine(instance, data_parallel_index=index)).summary()])[0] for index in range(3)
    ]
    assert [answer.reason for answer in answers] == ["", "", "too_many_ranks_of_engine"]
    assert monitor.metric("stream_monitor_messages_total", reason="too_many_ranks_of_engine") == 1
    assert monitor.publish([Engine().summary()])[0].outcome == ACCEPTED


def account(monitor: Running, phase: str = "token") -> tuple[float, float]:
    """Expected rows, and the sum of what became of them."""
    return (
        monitor.metric("stream_monitor_rows_expected_total", phase=phase),
        monitor.metric("stream_monitor_rows_total", phase=phase),
    )


def discarded(monitor: Running, reason: str) -> float:
    return monitor.metric("stream_monitor_rows_total", outcome="discarded", reason=reason)


def test_the_account_is_exact_and_survives_the_monitor(run: Callable[..., Running]) -> None:
    rank = Engine()
    monitor = run()
    monitor.publish(rank.request("a", [4, 4]))
    assert account(monitor) == (4 * rank.captured + 7, 4 * rank.captured + 7)
    # Killed without a word: its state is gone, its socket is left behind.
    path = monitor.server.ingest_address.removeprefix("unix:")
    monitor.call(monitor.server.front._servers[0].stop(0))
    again = run(ingest=f"unix:{path}")
    again.publish(rank.request("b", [4]))
    assert account(again) == (4 * rank.captured + 7, 4 * rank.captured + 7)
    assert again.metric("stream_monitor_rows_total", outcome="captured") == 9 * rank.heads


def test_two_ranks_and_two_engines_add_up(monitor: Running) -> None:
    first = engine(tensor_parallel_size=2)
    ranks = [
        Engine(first),
        Engine(engine(first.instance, (3,), tensor_parallel_size=2, tensor_parallel_rank=1)),
        Engine(),
    ]
    for rank in ranks:
        monitor.publish([rank.summary([Look("r", 48 + n)]) for n in range(3)])
        monitor.publish([rank.summary()])
    expected = sum(4 * rank.captured + 7 for rank in ranks)
    assert account(monitor) == (expected, expected)


def test_rows_past_the_end_move_to_discarded(monitor: Running) -> None:
    rank = Engine()
    monitor.publish(
        [
            rank.summary([Look("r", 48), Look("r", 52), Look("r", 53)], started=[started("r")]),
            rank.summary(finished=[finished("r", 52)]),
            rank.summary([Look("r", 54)]),
        ]
    )
    assert discarded(monitor, "past_end") == 3 * rank.heads
    assert monitor.metric("stream_monitor_rows_total", outcome="captured") == rank.heads
    assert account(monitor) == (4 * rank.captured + 7,) * 2
    assert monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="r")).info.rows_kept == 1


def test_exported_counters_never_fall(monitor: Running) -> None:
    rank = Engine()
    stream = Stream(monitor)
    stream.send(rank.summary([Look("r", 48), Look("r", 52)], started=[started("r")]))
    before = monitor.metric("stream_monitor_rows_total", outcome="captured")
    stream.send(rank.summary(finished=[finished("r", 50)]))
    assert monitor.metric("stream_monitor_rows_total", outcome="captured") == before
    assert account(monitor) == (4 * rank.captured + 7,) * 2
    stream.send(rank.summary([Look("s", 48)], started=[started("s")]))
    assert monitor.metric("stream_monitor_rows_total", outcome="captured") == before
    assert discarded(monitor, "past_end") == rank.heads
    assert account(monitor) == (4 * rank.captured + 7,) * 2
    stream.close()


def test_of_two_attempts_the_last_stands(monitor: Running) -> None:
    rank = Engine()
    look = Look("r", 48, target=4)
    monitor.publish(
        [
            rank.summary([look], started=[started("r")]),
            rank.summary(tokens=[tokens("r", 48), tokens("r", 54)]),
            rank.summary([Look("r", 48, target=30, attempt=1)]),
            rank.summary([look]),
            rank.summary([Look("r", 48, target=30, attempt=1)]),
            rank.summary(finished=[finished("r", 60)]),
        ]
    )
    assert (discarded(monitor, "recomputed"), discarded(monitor, "stale"), discarded(monitor, "repeated")) == (4, 4, 4)
    assert account(monitor) == (4 * rank.captured + 7,) * 2
    trace = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="r"))
    assert np.frombuffer(trace.row_attempts, "<u4").tolist() == [1]
    columns = np.frombuffer(trace.matrix_column, "<u4").tolist()
    assert 5 in columns
    assert 0 not in columns


def test_a_session_that_goes_on_is_truncated(monitor: Running) -> None:
    rank = Engine()
    monitor.publish(
        [
            rank.summary(started=[started("r")]),
            rank.summary(tokens=[tokens("r", 48), tokens("r", 54)]),
            rank.summary([Look("r", 48), Look("r", 58), Look("r", 59)]),
            # The last sampled token (59) is dropped, the new prompt follows.
            rank.summary(started=[started("r", 72)]),
            rank.summary([Look("r", 72)], tokens=[tokens("r", 72), tokens("r", 78)]),
            rank.summary(finished=[finished("r", 84)]),
        ]
    )
    trace = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="r"))
    assert np.frombuffer(trace.row_positions, "<u4").tolist() == [48, 58, 72]
    assert discarded(monitor, "readded") == rank.heads
    edges = [(s.first_token, s.end_token) for s in trace.sentences]
    assert edges[0][0] == 0
    assert edges[-1][1] == 84
    assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))


def test_a_start_told_twice_changes_nothing(monitor: Running) -> None:
    rank = Engine()
    monitor.publish(
        [
            rank.summary([Look("r", 48)], started=[started("r")]),
            rank.summary([Look("r", 50)], started=[started("r")]),
        ]
    )
    assert monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="r")).info.rows_kept == 2
    assert monitor.metric("stream_monitor_requests_started_total") == 1


def test_a_gap_between_token_runs_is_counted(monitor: Running) -> None:
    rank = Engine()
    monitor.publish(
        [
            rank.summary(started=[started("r")]),
            rank.summary(tokens=[tokens("r", 48), tokens("r", 64), tokens("r", 5000)]),
        ]
    )
    assert monitor.metric("stream_monitor_tokens_missing_total") == 10 + 5000 - 70
    edges = [
        (s.first_token, s.end_token)
        for s in monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="r")).sentences
    ]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))


def test_a_refused_request_says_why(monitor: Running) -> None:
    rank = Engine()
    monitor.publish([rank.summary(started=[started("r", refused="client_disabled")])])
    (info,) = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests
    assert info.refused_reason == "client_disabled"
    assert monitor.metric("stream_monitor_requests_refused_total") == 1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_bytes_bring_the_monitor_down(shared_monitor: Running, data: st.DataObject) -> None:
    monitor = shared_monitor
    whole = bytearray(ingest_pb2.PublishRequest(summary=good()).SerializeToString())
    if data.draw(st.booleans()):
        raw = data.draw(st.binary(max_size=200))
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        raw = bytes(whole)
    try:
        monitor.publish_raw([raw])
        status = Status.OK
    except grpc.RpcError as error:
        status = error.code()
    assert status in (Status.OK, Status.INVALID_ARGUMENT, Status.FAILED_PRECONDITION, Status.OUT_OF_RANGE)
    assert next(a.outcome for a in monitor.publish([Engine().summary()])) in (ACCEPTED, REFUSED)
