"""What is taken in by the monitor's own parts, without a network: sessions, ranks that lag, hostile shapes."""

import time
import uuid
from collections import Counter
from collections.abc import Sequence

import grpc
import numpy as np
import pytest

from stream_monitor.anchors.matrix import SentenceStarts
from stream_monitor.monitor.calibration import Calibration
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.intake import Intake, Stream
from stream_monitor.monitor.merge import Merger
from stream_monitor.monitor.metrics import Metrics
from stream_monitor.monitor.pipeline import Pipeline
from stream_monitor.monitor.ranks import RankBook, key_of
from stream_monitor.monitor.store import TraceStore
from stream_monitor.monitor.text import Vocabularies
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.records import Role
from stream_monitor.v1alpha1 import ingest_pb2, monitor_pb2, summary_pb2
from tests.monitor.synthetic import SENTENCE, Engine, Look, engine, finished, tokens

Summaries = list[summary_pb2.StepSummary]
DEADLINE = 0.1


class Taker:
    """An intake, and one stream for each rank."""

    def __init__(self, max_sentences: int = 4096) -> None:
        self.metrics = Metrics()
        self.graveyard = Graveyard()
        self.store = TraceStore(1000, 1 << 30, max_sentences)
        log = EventLog(1000, 100, 10)
        pipeline = Pipeline(self.store, log, self.metrics, Calibration(), Vocabularies({}), graveyard=self.graveyard)
        self.intake = Intake(RankBook(64), Merger(DEADLINE), pipeline, self.metrics, 4 << 20)

    def take(self, summaries: Summaries) -> None:
        stream = Stream()
        self.intake.take([ingest_pb2.PublishRequest(summary=each).SerializeToString() for each in summaries], stream)
        assert stream.fault is None, stream.fault
        self.intake.score()

    def trace(self, rank: Engine, name: str = "r") -> RequestTrace:
        found = self.store.get(rank.info.instance, name)
        assert found is not None
        return found

    def verdicts(self) -> Counter[str]:
        (family,) = [each for each in self.metrics.registry.collect() if each.name == "stream_monitor_verdicts"]
        return Counter(
            {
                sample.labels["verdict"]: int(sample.value)
                for sample in family.samples
                if sample.labels["kind"] == "untrusted_anchor" and sample.name.endswith("_total")
            }
        )


def start(length: int, roles: Sequence[tuple[int, Role]], name: str = "r") -> summary_pb2.RequestStarted:
    """A prompt with these roles from these tokens on, in sentences of six tokens."""
    return summary_pb2.RequestStarted(
        request_id=name,
        prompt_tokens=length,
        role_starts=np.array([first for first, _ in roles], "<u4").tobytes(),
        roles=bytes(int(role) for _, role in roles),
        prompt_flags=(SENTENCE * (length // 6 + 1))[:length],
    )


def output(rank: Engine, first: int, targets: Sequence[int], share: float = 0.5) -> Summaries:
    """A sentence for each target, with three rows that look at it."""
    found = []
    for target in targets:
        found.append(rank.summary(tokens=[tokens("r", first)]))
        found += [rank.summary([Look("r", first + offset, target, share=share)]) for offset in (0, 2, 4)]
        first += len(SENTENCE)
    return found


SPOKEN = [(0, Role.USER), (48, Role.REASONING), (72, Role.UNTRUSTED)]


@pytest.mark.parametrize("turns", [1, 2])
def test_what_a_tool_says_later_in_a_session_is_watched_like_a_prompt_s(turns: int) -> None:
    taker, rank = Taker(), Engine()
    if turns == 2:
        taker.take([rank.summary(started=[start(48, SPOKEN[:1])]), *output(rank, 48, [6] * 4)])
        before = taker.verdicts()
    else:
        before = Counter[str]()
    taker.take([rank.summary(started=[start(120, SPOKEN)]), *output(rank, 120, [80] * 12, share=0.8)])
    taker.take([rank.summary(finished=[finished("r", 192)])])
    said = taker.verdicts()
    said.subtract(before)
    assert said["alarm"] == 1
    assert said["steady"] == 11, said
    assert [finding.kind for finding in taker.trace(rank).findings] == [monitor_pb2.EVENT_KIND_UNTRUSTED_ANCHOR]


def test_many_short_turns_leave_half_of_the_sentences_to_the_output() -> None:
    taker, rank = Taker(max_sentences=64), Engine()
    roles = [(6 * turn, (Role.USER, Role.SYSTEM, Role.UNTRUSTED)[turn % 3]) for turn in range(100)]
    taker.take([rank.summary(started=[start(600, roles)]), *output(rank, 600, [6] * 20)])
    taker.take([rank.summary(finished=[finished("r", 720)])])
    trace = taker.trace(rank)
    assert trace.prompt_sentences <= 32
    assert (len(trace.spans) - trace.prompt_sentences, trace.dropped_sentences) == (20, 0)
    assert {span.role for span in trace.spans[: trace.prompt_sentences]} == {Role.UNTRUSTED}, "which wins"
    edges = [span.start for span in trace.spans[: trace.prompt_sentences]]
    assert edges == sorted(set(edges))
    assert trace.spans[trace.prompt_sentences - 1].end == 600


def two_ranks() -> tuple[Engine, Engine]:
    instance = str(uuid.uuid4())
    one, other = (
        Engine(engine(instance, tensor_parallel_rank=rank, tensor_parallel_size=2, first_query_head=4 * rank))
        for rank in range(2)
    )
    return one, other


def test_a_start_that_comes_after_the_end_leaves_the_trace_alone() -> None:
    taker, (rank, late) = Taker(), two_ranks()
    taker.take(rank.request("r", [4] * 14 + [30] * 8))
    time.sleep(2 * DEADLINE)
    taker.intake.flush()
    before = taker.trace(rank)
    assert before.finished
    sentences, findings = len(before.spans), before.finding_count
    assert findings
    taker.take(late.request("r", [4] * 14 + [30] * 8))
    taker.intake.flush()
    assert taker.trace(rank) is before
    assert (len(before.spans), before.finding_count) == (sentences, findings)
    # The id used again, by a rank that told of the start, is another request.
    taker.take([rank.summary(started=[start(48, SPOKEN[:1])])])
    time.sleep(2 * DEADLINE)
    taker.intake.flush()
    assert taker.trace(rank) is not before


def test_roles_that_are_told_after_a_row_still_count() -> None:
    taker, (rank, other) = Taker(), two_ranks()
    bare = summary_pb2.RequestStarted(request_id="r", prompt_tokens=120)
    taker.take([other.summary(started=[bare]), other.summary([Look("r", 119, 80)])])
    time.sleep(2 * DEADLINE)
    taker.intake.flush()
    assert taker.trace(rank).prompt_sentences == 1
    taker.take([rank.summary(started=[start(120, SPOKEN)])])
    time.sleep(2 * DEADLINE)
    taker.intake.flush()
    assert {span.role for span in taker.trace(rank).spans} == {Role.USER, Role.REASONING, Role.UNTRUSTED}


def test_replacing_many_rows_of_one_long_sentence_takes_no_longer_than_sending_them() -> None:
    taker, rank = Taker(), Engine()
    taker.take([rank.summary(started=[summary_pb2.RequestStarted(request_id="r", prompt_tokens=8000)])])
    begun = time.process_time()
    for first in range(0, 8000, 1000):
        taker.take(
            [
                rank.summary(
                    [Look("r", at, 0, phase=summary_pb2.PHASE_PREFILL_CHUNK) for at in range(first, first + 1000)]
                )
            ]
        )
    sent = time.process_time() - begun
    held = taker.trace(rank).rows.matrix(taker.trace(rank).spans)
    begun = time.process_time()
    again = [Look("r", at, 0, attempt=1, phase=summary_pb2.PHASE_PREFILL_CHUNK) for at in range(1000)]
    taker.take([rank.summary(again)])
    assert time.process_time() - begun < 2 * sent
    found = taker.trace(rank).rows.matrix(taker.trace(rank).spans)
    assert found.captured.tolist() == held.captured.tolist() == [8000]
    np.testing.assert_allclose(found.shares, held.shares)


def test_a_long_sentence_takes_no_table_of_its_tokens() -> None:
    starts = SentenceStarts()
    starts.append(0, 1 << 20)
    assert starts.nbytes == 0
    starts.append(1 << 20, (1 << 20) + 8)
    assert starts.of(np.array([5, (1 << 20) + 3], np.uint32)).tolist() == [0, 1]


def test_a_deleted_request_is_no_exemplar_of_what_comes_later() -> None:
    taker, rank = Taker(), Engine()
    name = "chatcmpl-gone-bee6d49e"
    messages = rank.request(name, [4] * 6)
    for message in messages:
        message.wall_time_ns = time.time_ns()
    taker.graveyard.bury((rank.info.instance, name), time.time_ns() + 10**12)
    taker.take(messages)
    exemplars = [
        sample.exemplar.labels
        for family in taker.metrics.registry.collect()
        for sample in family.samples
        if sample.exemplar
    ]
    assert exemplars == []


def test_a_session_of_many_turns_notes_a_rank_once() -> None:
    taker, rank = Taker(), Engine()
    for turn in range(1, 6):
        taker.take([rank.summary(started=[start(48 * turn, SPOKEN[:1])])])
    assert len(taker.trace(rank).started_by) == 1


def test_a_second_rank_on_a_stream_ends_it_and_takes_no_place() -> None:
    taker, (one, other) = Taker(), two_ranks()
    stream = Stream()
    summaries = [one.summary(), one.summary(), other.summary(), one.summary()]
    raw = [ingest_pb2.PublishRequest(summary=each).SerializeToString() for each in summaries]
    assert [answer.sequence for answer in taker.intake.take(raw, stream)] == [1, 2], "what came before it counts"
    assert stream.fault is not None
    assert (stream.fault.status, stream.fault.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "other_rank")
    assert str(stream.fault) == "engine names another rank than before; open a stream for each rank"
    assert [rank.key for rank in taker.intake.ranks.ranks.values()] == [key_of(one.info)]
    assert taker.metrics.registry.get_sample_value(
        "stream_monitor_messages_total", {"outcome": "invalid", "reason": "other_rank"}
    )


def test_a_stream_whose_rank_was_refused_brings_no_other_one() -> None:
    taker, (one, other) = Taker(), two_ranks()
    taker.intake.ranks.limit = 1
    taker.take([one.summary()])
    stream = Stream()
    raw = [ingest_pb2.PublishRequest(summary=each.summary()).SerializeToString() for each in (other, one)]
    (answer,) = taker.intake.take(raw, stream)
    assert answer.reason == "too_many_ranks"
    assert stream.fault is not None
    assert stream.fault.reason == "other_rank"
