"""The opening, the row from which the first token of an output is sampled: scored once, whatever becomes of it."""

import uuid
from collections.abc import Sequence

import numpy as np
import pytest

from stream_monitor.anchors.calibration import calibrated
from stream_monitor.anchors.panel import OPENING, Kind
from stream_monitor.monitor.calibrate import served
from stream_monitor.monitor.folding import fold
from stream_monitor.monitor.ranks import Rank, key_of
from stream_monitor.monitor.rows import Row, decode
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2
from tests.monitor.conftest import Running
from tests.monitor.synthetic import SENTENCE, Engine, Look, engine, finished, rows, started, tokens
from tests.monitor.test_findings import UNTRUSTED, labelled, run

PROMPT, LAST = 48, 47
"""Tokens of a prompt, and its last one."""
USER = 28
UNTRUSTED_KIND = monitor_pb2.EVENT_KIND_UNTRUSTED_ANCHOR
CHUNK, END = summary_pb2.PHASE_PREFILL_CHUNK, summary_pb2.PHASE_PREFILL_END

Summaries = list[summary_pb2.StepSummary]


def opened(rank: Engine, name: str, *looks: Look, trusted: bool = False) -> Summaries:
    """A start and rows, each in a step of its own."""
    return [
        rank.summary(started=[started(name) if trusted else labelled(name)]),
        *(rank.summary([look]) for look in looks),
    ]


def ended(rank: Engine, name: str, sentences: int = 1) -> Summaries:
    """Sentences with three rows each that look at the user's, from the seventh on at the first of them, and the end."""
    found = []
    for first in range(PROMPT, PROMPT + sentences * len(SENTENCE), len(SENTENCE)):
        found.append(rank.summary(tokens=[tokens(name, first)]))
        target = USER if first < PROMPT + 6 * len(SENTENCE) else PROMPT
        found += [rank.summary([Look(name, first + offset, target)]) for offset in (0, 2, 4)]
    return [*found, rank.summary(finished=[finished(name, PROMPT + sentences * len(SENTENCE))])]


def trace_of(monitor: Running, name: str) -> monitor_pb2.GetTraceResponse:
    return monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id=name, with_heads=True))


def verdicts(monitor: Running, verdict: str) -> float:
    return monitor.metric("stream_monitor_verdicts_total", kind="untrusted_anchor", verdict=verdict)


def said(monitor: Running) -> dict[str, float]:
    return {verdict: verdicts(monitor, verdict) for verdict in ("insufficient", "steady", "alarm")}


def test_an_answer_of_two_tokens_is_found_by_its_opening(monitor: Running) -> None:
    rank = Engine()
    monitor.publish(
        [
            *opened(rank, "short", Look("short", LAST, UNTRUSTED, phase=END)),
            rank.summary(tokens=[tokens("short", PROMPT, SENTENCE[:2])]),
            rank.summary(finished=[finished("short", PROMPT + 2)]),
        ]
    )
    trace = trace_of(monitor, "short")
    (event,) = trace.events
    assert event.kind == monitor_pb2.EVENT_KIND_UNTRUSTED_ANCHOR
    assert (event.sentence.end_token, event.began.index) == (PROMPT, event.sentence.index)
    assert event.to_anchors[0].sentence.role == summary_pb2.ROLE_UNTRUSTED
    assert event.summary.startswith("from its first token on the output rests most on sentence 1")
    assert [round(head.share, 2) for head in event.heads] == [0.25] * 4
    assert said(monitor) == {"insufficient": 1, "steady": 0, "alarm": 1}
    code, text, _ = run("explain", "short", "1", "--target", monitor.server.grpc_address)
    assert code == 0
    told = f"detected at {event.sentence.index}, from whose last token the output's first one is sampled"
    assert told in " ".join(text.split())


def row(look: Look, rank: Rank) -> Row:
    """As one rank tells of it."""
    (found,) = decode(rows([look], rank.engine), rank.engine, ((rank, 4),))
    return found


def test_what_comes_before_the_next_row_belongs_to_it() -> None:
    """A rank that missed its deadline, the end of a chunk that comes late."""
    trace = RequestTrace("i", "r", ("tiny", "0"), 1, 0, 1024)
    trace.start(labelled("r"))
    infos = [engine("i", tensor_parallel_rank=number, first_query_head=2 * number) for number in (0, 1)]
    one, other = (Rank(key_of(info), info, ("tiny", "0")) for info in infos)
    trace.add_row(row(Look("r", LAST, USER, 0.3, phase=END), one))
    trace.add_row(row(Look("r", 45, USER, phase=CHUNK), one))
    assert trace.settle() == []
    trace.add_row(row(Look("r", LAST, UNTRUSTED, 0.6, phase=END), other))
    assert trace.settle() == []
    trace.add_row(row(Look("r", PROMPT, USER), one))
    assert trace.settle() == [7]
    found = fold(trace.unfolded(7))
    assert [each.position for each in found.folded.rows] == [LAST]
    assert found.telling == 1
    assert set(found.shares.heads.tolist()) == set(range(8))
    trace.add_row(row(Look("r", PROMPT + 1, USER), one))
    trace.finish(PROMPT + 2)
    assert trace.settle() == [8]


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param([Look("r", 15, UNTRUSTED, phase=CHUNK), Look("r", 45, USER, phase=CHUNK)], id="chunked prefill"),
        pytest.param([Look("r", LAST, USER, phase=END)], id="resumed before its first token was sent"),
    ],
)
def test_what_comes_before_it_changes_nothing(monitor: Running, looks: Sequence[Look]) -> None:
    rank = Engine()
    opening = Look("r", LAST, UNTRUSTED, phase=END, attempt=1)
    monitor.publish([*opened(rank, "r", *looks, opening), *ended(rank, "r")])
    (event,) = trace_of(monitor, "r").events
    assert event.sentence.end_token == PROMPT
    assert said(monitor) == {"insufficient": 0, "steady": 1, "alarm": 1}


def test_a_prompt_read_again_after_preemption_is_not_scored_again(monitor: Running) -> None:
    rank = Engine()
    again = [Look("r", LAST, UNTRUSTED, phase=CHUNK, attempt=1), Look("r", 50, USER, phase=END, attempt=1)]
    summaries = [
        *opened(rank, "r", Look("r", LAST, USER, phase=END)),
        rank.summary(tokens=[tokens("r", PROMPT, SENTENCE[:3])]),
        rank.summary([Look("r", 49, USER)]),
        rank.summary(started=[labelled("r")]),
        *(rank.summary([look]) for look in again),
        *ended(rank, "r"),
    ]
    monitor.publish(summaries)
    trace = trace_of(monitor, "r")
    assert not trace.events
    assert said(monitor) == {"insufficient": 0, "steady": 2, "alarm": 0}
    # The row that was computed again stands in the matrix, in the place of the first.
    assert dict(zip(positions(trace), np.frombuffer(trace.row_attempts, "<u4").tolist(), strict=True))[50] == 1


def positions(trace: monitor_pb2.GetTraceResponse) -> list[int]:
    return list(np.frombuffer(trace.row_positions, "<u4").tolist())


def test_it_waits_for_all_ranks(monitor: Running) -> None:
    """Only the second rank's heads read the document, more than the first's read the user's."""
    instance = str(uuid.uuid4())
    one, other = (
        Engine(engine(instance, tensor_parallel_size=2, tensor_parallel_rank=rank, first_query_head=2 * rank))
        for rank in (0, 1)
    )
    shares = Look("r", LAST, USER, 0.3, 0.6, phase=END), Look("r", LAST, UNTRUSTED, 0.6, 0.3, phase=END)
    told = (opened(rank, "r", look) + ended(rank, "r") for rank, look in zip((one, other), shares, strict=True))
    for pair in zip(*told, strict=True):
        for summary in pair:
            monitor.publish([summary])
    trace = trace_of(monitor, "r")
    (event,) = trace.events
    assert event.score == pytest.approx(np.log(2), abs=0.02)
    assert {head.head.query_head for head in event.heads[:4]} == {2, 3}
    assert said(monitor) == {"insufficient": 0, "steady": 1, "alarm": 1}


def test_samples_of_one_prompt_have_one_each(monitor: Running) -> None:
    rank = Engine()
    for number in range(2):
        name = f"{number}_cmpl-x-abcdef01"
        monitor.publish([*opened(rank, name, Look(name, LAST, UNTRUSTED, phase=END)), *ended(rank, name)])
        assert len(trace_of(monitor, name).events) == 1
    assert said(monitor) == {"insufficient": 0, "steady": 2, "alarm": 2}


def test_one_that_was_not_captured_is_told(monitor: Running) -> None:
    rank = Engine()
    monitor.publish([*opened(rank, "r"), *ended(rank, "r")])
    monitor.publish([*opened(rank, "trusted", trusted=True), *ended(rank, "trusted")])
    monitor.publish([*opened(rank, "aborted"), rank.summary(finished=[finished("aborted", PROMPT)])])
    assert said(monitor) == {"insufficient": 2, "steady": 1, "alarm": 0}
    assert not trace_of(monitor, "r").events


def test_the_sentence_matrix_and_its_scores_are_without_it(monitor: Running) -> None:
    """Whether part of the prompt is untrusted changes what is scored, not what was read."""
    rank, traces = Engine(), []
    for trusted in (True, False):
        name = f"trusted-{trusted}"
        look = Look(name, LAST, UNTRUSTED, phase=END)
        monitor.publish([*opened(rank, name, look, trusted=trusted), *ended(rank, name, 20)])
        traces.append(trace_of(monitor, name))
    one, other = traces
    for part in ("matrix_row", "matrix_column", "matrix_share", "captured_rows", "vertical_score", "receiver_score"):
        assert getattr(one, part) == getattr(other, part), part
    assert [head.kurtosis for head in one.heads] == [head.kurtosis for head in other.heads]
    assert np.isfinite([head.kurtosis for head in one.heads]).all()
    assert len(one.head_row) < len(other.head_row)


def test_calibration_scores_what_was_scored_live(monitor: Running) -> None:
    rank = Engine()
    for number, share in enumerate(np.linspace(0.1, 0.8, 8)):
        name = f"r{number}"
        monitor.publish([*opened(rank, name, Look(name, LAST, UNTRUSTED, share, phase=END)), *ended(rank, name)])
    traces = [trace_of(monitor, f"r{number}") for number in range(8)]
    raised = [event.score for trace in traces for event in trace.events]
    assert raised
    profile = calibrated("tiny", "c", 1, [served(trace) for trace in traces])
    assert len(profile.highest[OPENING]) == 8
    assert profile.highest[OPENING][-len(raised) :] == pytest.approx(sorted(raised))
    sentences = [score for trace in traces for score in trace.info.scores if score.kind == UNTRUSTED_KIND]
    assert profile.highest[Kind.UNTRUSTED_ANCHOR] == pytest.approx(sorted(score.highest for score in sentences))
    assert 7 not in {score.sentence for score in sentences}, "the prompt's last sentence"
