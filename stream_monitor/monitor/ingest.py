"""IngestService: summaries in, one answer each, in order; what breaks the contract ends its own stream and no other."""

import asyncio
import time

import grpc

from stream_monitor.monitor import identity, store
from stream_monitor.monitor.access import rights
from stream_monitor.monitor.faults import Fault, Refusal
from stream_monitor.monitor.ledger import RankLedger
from stream_monitor.monitor.merge import Merger, Part
from stream_monitor.monitor.metrics import Metrics, exemplar
from stream_monitor.monitor.pipeline import Pipeline
from stream_monitor.monitor.ranks import Rank, RankBook
from stream_monitor.monitor.rows import check_audits, decode
from stream_monitor.monitor.validate import parse
from stream_monitor.v1alpha1 import ingest_pb2, summary_pb2

SERVICE = ingest_pb2.DESCRIPTOR.services_by_name["IngestService"].full_name
RATE_SECONDS = 10.0
"""Over which the rate of messages is counted: an outage of the monitor is made up for in a burst."""
Context = grpc.aio.ServicerContext[bytes, ingest_pb2.PublishResponse]


class Ingest:
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
        self._streams: set[asyncio.Task[None]] = set()
        self._stopping = False

    def handler(self) -> grpc.GenericRpcHandler:
        """The service for a grpc.aio server. Requests stay bytes, so that what cannot be parsed is ours to answer."""
        publish: grpc.RpcMethodHandler[bytes, ingest_pb2.PublishResponse] = grpc.stream_stream_rpc_method_handler(
            self._publish, response_serializer=ingest_pb2.PublishResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Publish": publish})

    def stop(self) -> None:
        """End all streams with UNAVAILABLE after the message in hand; what is not acknowledged will be sent again."""
        self._stopping = True
        for stream in self._streams:
            stream.cancel()

    def flush(self) -> None:
        """Let go of steps whose deadline is over, and note whose engine is gone."""
        now = time.monotonic()
        for step in self.merger.flush(now):
            self.pipeline.apply(step)
        self.pipeline.store.cut_off(self.ranks.connected(), now)
        self.ranks.close_silent(now - store.GONE_SECONDS)
        if now - self._rates_from >= RATE_SECONDS:
            self._rates_from = now
            for rank in self.ranks.ranks.values():
                rank.recent_messages = 0

    async def _publish(self, _: object, context: Context) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        opened: set[Rank] = set()
        try:
            await self._read(context, opened)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the monitor is stopping")
        finally:
            self._streams.discard(task)
            for rank in opened:
                rank.streams -= 1
                rank.left_at = time.monotonic()

    async def _read(self, context: Context, opened: set[Rank]) -> None:
        last: dict[Rank, int] = {}
        publishes_for = rights.current().publishes_for
        while True:
            raw = await context.read()
            if not isinstance(raw, bytes):  # grpc.aio.EOF
                return
            self.metrics.message_bytes.inc(len(raw))
            try:
                answer = self.take(raw, last, opened, publishes_for)
            except Fault as fault:
                self.metrics.messages.labels("invalid", fault.reason).inc()
                await context.abort(fault.status, str(fault))
            await context.write(answer)

    def take(
        self, raw: bytes, last: dict[Rank, int], opened: set[Rank], publishes_for: str = ""
    ) -> ingest_pb2.PublishResponse:
        """Take in one message; `last` is the newest sequence of each rank on this stream, `publishes_for` the tenant of
        its publisher's credential, if it is of one."""
        summary = parse(raw, self.max_bytes)
        try:
            rank = self.ranks.admit(summary.engine, publishes_for)
        except Refusal as refusal:
            self.metrics.messages.labels("refused", refusal.reason).inc()
            return _answer(summary, ingest_pb2.PUBLISH_OUTCOME_REFUSED, refusal.reason)
        if rank not in opened:
            opened.add(rank)
            self.ranks.opened(rank)
            self.metrics.know(rank.labels)
        if summary.sequence <= last.get(rank, 0):
            raise Fault(
                grpc.StatusCode.OUT_OF_RANGE,
                "out_of_order",
                f"sequence is {summary.sequence} after {last[rank]}; it must ascend on a stream",
            )
        last[rank] = summary.sequence
        if summary.sequence <= rank.sequence:
            self.metrics.messages.labels("duplicate", "").inc()
            return _answer(summary, ingest_pb2.PUBLISH_OUTCOME_DUPLICATE)
        rank.recent_messages += 1
        if rank.recent_messages > self._most_recent:
            _count_gap(rank, summary)
            self.metrics.messages.labels("refused", "message_rate").inc()
            return _answer(summary, ingest_pb2.PUBLISH_OUTCOME_REFUSED, "message_rate")
        part = self._part(rank, summary, len(raw))
        _count_gap(rank, summary)
        _account(rank.ledger, summary)
        self._observe(part)
        for step in self.merger.add(part):
            self.pipeline.apply(step)
        self.metrics.messages.labels("accepted", "").inc()
        return _answer(summary, ingest_pb2.PUBLISH_OUTCOME_ACCEPTED)

    def _part(self, rank: Rank, summary: summary_pb2.StepSummary, size: int) -> Part:
        rows = decode(summary.rows, rank.engine, ((rank, rank.heads),)) if summary.HasField("rows") else []
        if rows and not summary.step:
            raise Fault(grpc.StatusCode.INVALID_ARGUMENT, "value", "step is missing in a message with rows")
        check_audits(summary.audits)
        # The decoded rows replace the arrays, which would otherwise wait in memory with the step.
        summary.ClearField("rows")
        return Part(rank, summary, rows, time.monotonic(), size)

    def _observe(self, part: Part) -> None:
        rank, summary = part.rank, part.summary
        for audit in summary.audits:
            self.metrics.recall.labels(*rank.labels).observe(audit.recall)
        if summary.wall_time_ns > 0:
            delay = max(0.0, time.time() - summary.wall_time_ns / 1e9)
            named = exemplar(identity.parse(part.rows[0].request_id).external_id) if part.rows else None
            self.metrics.step_delay.labels(*rank.labels).observe(delay, named)


def _count_gap(rank: Rank, summary: summary_pb2.StepSummary) -> None:
    """A message is dealt with; those between it and the one before never came."""
    if rank.sequence:
        rank.lost_messages += summary.sequence - rank.sequence - 1
    rank.sequence = summary.sequence


def _account(ledger: RankLedger, summary: summary_pb2.StepSummary) -> None:
    if summary.HasField("ledger"):
        ledger.newest = summary_pb2.Ledger()
        ledger.newest.CopyFrom(summary.ledger)


def _answer(
    summary: summary_pb2.StepSummary, outcome: ingest_pb2.PublishOutcome.ValueType, reason: str = ""
) -> ingest_pb2.PublishResponse:
    return ingest_pb2.PublishResponse(sequence=summary.sequence, outcome=outcome, reason=reason)
