"""Messages in, one answer each, in order: checked, counted, merged and applied."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from stream_monitor.monitor import identity, store
from stream_monitor.monitor.faults import Fault, Refusal, invalid
from stream_monitor.monitor.merge import Merger, Part
from stream_monitor.monitor.metrics import Metrics, exemplar
from stream_monitor.monitor.pipeline import Pipeline
from stream_monitor.monitor.ranks import Rank, RankBook, RankKey, key_of
from stream_monitor.monitor.rows import Row, check_audits, decode
from stream_monitor.monitor.validate import parse
from stream_monitor.v1alpha1 import ingest_pb2, summary_pb2

RATE_SECONDS = 10.0
"""Over which the rate of messages is counted: an outage of the monitor is made up for in a burst."""
_ACCEPTED = ingest_pb2.PUBLISH_OUTCOME_ACCEPTED
_DUPLICATE = ingest_pb2.PUBLISH_OUTCOME_DUPLICATE
_REFUSED = ingest_pb2.PUBLISH_OUTCOME_REFUSED


@dataclass(eq=False)
class Stream:
    """What a stream of messages has said so far.

    Attributes:
        publishes_for: the tenant of its publisher's credential, if it is of one.
        key: of the one rank that it is of, as its first message says.
        rank: the same once it was admitted.
        newest: sequence of its newest message.
        fault: what was wrong with the message that ended it.
    """

    publishes_for: str = ""
    key: RankKey | None = None
    rank: Rank | None = None
    newest: int = 0
    fault: Fault | None = None


@dataclass(slots=True)
class _Message:
    summary: summary_pb2.StepSummary
    size: int
    outcome: ingest_pb2.PublishOutcome.ValueType
    rank: Rank | None = None
    reason: str = ""
    rows: list[Row] = field(default_factory=list)


class Intake:
    """Takes in messages of all streams.

    Args:
        max_bytes: of the largest message taken in.
        max_rate: messages a second of one rank, over `RATE_SECONDS`.
    """

    def __init__(
        self,
        ranks: RankBook,
        merger: Merger,
        pipeline: Pipeline,
        metrics: Metrics,
        max_bytes: int,
        max_rate: int = 5000,
    ) -> None:
        self.ranks = ranks
        self.merger = merger
        self.pipeline = pipeline
        self.metrics = metrics
        self.max_bytes = max_bytes
        self._most_recent = int(max_rate * RATE_SECONDS)
        self._rates_from = time.monotonic()

    def take(self, messages: Sequence[bytes], stream: Stream) -> list[ingest_pb2.PublishResponse]:
        """Take in what came on one stream; an answer to each message before the first fault, which is left in
        `stream.fault`. Sentences are scored by `score`."""
        self.metrics.message_bytes.inc(sum(map(len, messages)))
        answers: list[ingest_pb2.PublishResponse] = []
        try:
            for raw in messages:
                answers.append(self._apply(self._read(raw, stream)))
        except Fault as fault:
            stream.fault = fault
            self.metrics.messages.labels("invalid", fault.reason).inc()
        return answers

    def score(self) -> None:
        """Score the sentences that were closed since the last call."""
        self.pipeline.score()

    def flush(self) -> None:
        """Let go of steps whose deadline is over, and note whose engine is gone."""
        now = time.monotonic()
        for step in self.merger.flush(now):
            self.pipeline.apply(step)
        self.score()
        self.pipeline.store.cut_off(self.ranks.connected(), now)
        self.ranks.close_silent(now - store.GONE_SECONDS)
        if now - self._rates_from >= RATE_SECONDS:
            self._rates_from = now
            for rank in self.ranks.ranks.values():
                rank.recent_messages = 0

    def _read(self, raw: bytes, stream: Stream) -> _Message:
        """Check a message, and decode its rows if it is to be taken in. Raises Fault."""
        summary = parse(raw, self.max_bytes)
        key = key_of(summary.engine)
        if stream.key is None:
            stream.key = key
        elif stream.key != key:
            # Open streams keep their ranks: one that brought many would take the places of other engines' for good.
            raise invalid("other_rank", "engine names another rank than before; open a stream for each rank")
        try:
            rank = self.ranks.admit(summary.engine, stream.publishes_for)
        except Refusal as refusal:
            return _Message(summary, len(raw), _REFUSED, reason=refusal.reason)
        if stream.rank is None:
            stream.rank = rank
            self.ranks.opened(rank)
            self.metrics.know(rank.labels)
        if summary.sequence <= stream.newest:
            raise Fault(
                grpc.StatusCode.OUT_OF_RANGE,
                "out_of_order",
                f"sequence is {summary.sequence} after {stream.newest}; it must ascend on a stream",
            )
        stream.newest = summary.sequence
        if summary.sequence <= rank.sequence:
            return _Message(summary, len(raw), _DUPLICATE, rank)
        rank.recent_messages += 1
        if rank.recent_messages > self._most_recent:
            return _Message(summary, len(raw), _REFUSED, rank, "message_rate")
        check_audits(summary.audits)
        return _Message(summary, len(raw), _ACCEPTED, rank, rows=_rows_of(summary, rank))

    def _apply(self, message: _Message) -> ingest_pb2.PublishResponse:
        summary, rank = message.summary, message.rank
        if rank is not None and message.outcome != _DUPLICATE:
            # It is dealt with; those between it and the one before never came.
            if rank.sequence:
                rank.lost_messages += summary.sequence - rank.sequence - 1
            rank.sequence = summary.sequence
        if rank is not None and message.outcome == _ACCEPTED:
            # The decoded rows replace the arrays, which would otherwise wait in memory with the step.
            summary.ClearField("rows")
            part = Part(rank, summary, message.rows, time.monotonic(), message.size)
            if summary.HasField("ledger"):
                # A copy: a part would keep the memory of the whole message.
                rank.ledger.newest = summary_pb2.Ledger()
                rank.ledger.newest.CopyFrom(summary.ledger)
            self._observe(part)
            for step in self.merger.add(part):
                self.pipeline.apply(step)
        self.metrics.messages.labels(_OUTCOMES[message.outcome], message.reason).inc()
        return ingest_pb2.PublishResponse(sequence=summary.sequence, outcome=message.outcome, reason=message.reason)

    def _observe(self, part: Part) -> None:
        rank, summary = part.rank, part.summary
        for audit in summary.audits:
            self.metrics.recall.labels(*rank.labels).observe(audit.recall)
        if summary.wall_time_ns > 0:
            delay = max(0.0, time.time() - summary.wall_time_ns / 1e9)
            named = self._exemplar_of(rank, part.rows[0].request_id) if part.rows else None
            self.metrics.step_delay.labels(*rank.labels).observe(delay, named)

    def _exemplar_of(self, rank: Rank, request_id: str) -> dict[str, str] | None:
        """Names a request, unless it was deleted."""
        graveyard = self.pipeline.graveyard
        if graveyard and (rank.engine.instance, request_id) in graveyard:
            return None
        return exemplar(identity.parse(request_id).external_id)


_OUTCOMES = {_ACCEPTED: "accepted", _DUPLICATE: "duplicate", _REFUSED: "refused"}


def _rows_of(summary: summary_pb2.StepSummary, rank: Rank) -> list[Row]:
    if not summary.HasField("rows"):
        return []
    if summary.rows.count and not summary.step:
        raise invalid("value", "step is missing in a message with rows")
    return decode(summary.rows, rank.engine, ((rank, rank.heads),))
