"""A worker that writes records, and a monitor that keeps what it is told, for the tests of the publisher."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np

from stream_monitor.records import (
    EngineInfo,
    Geometry,
    Ledger,
    Phase,
    RequestFinished,
    RequestStarted,
    RowLedger,
    Rows,
    StepRecord,
    TokenRun,
    encode,
)
from stream_monitor.ring import RingWriter
from stream_monitor.v1alpha1 import ingest_pb2, summary_pb2
from stream_monitor.v1alpha1.ingest_pb2_grpc import IngestServiceServicer, add_IngestServiceServicer_to_server

INFO = EngineInfo(
    instance="3f1c8a52-0000-4000-8000-000000000001",
    model_name="tiny",
    engine="0",
    data_parallel_index=0,
    tensor_parallel_rank=0,
    tensor_parallel_size=1,
    pipeline_parallel_rank=0,
    pipeline_parallel_size=1,
    layers=[4, 6],
    first_query_head=0,
    total_query_heads=4,
    query_heads=[0, 1, 3],
    geometry=Geometry(block_size=32, top_k=2, sink_blocks=1, recent_blocks=1, strategy="beam"),
    vllm_version="0.32.0",
    plugin_version="0.1.0",
)


def rows(request_id: str, position: int, phases: list[Phase]) -> Rows:
    """Rows of one request with arrays of the right shapes and no meaning."""
    count, cells = len(phases), len(phases) * INFO.heads_per_row
    return Rows(
        request_ids=[request_id] * count,
        positions=np.arange(position, position + count, dtype="<u4").tobytes(),
        attempts=bytes(4 * count),
        phases=bytes(phases),
        block_ids=b"",
        narrow_block_ids=bytes(cells * 2 * 2),
        block_log_share=bytes(cells * 2 * 2),
        block_strongest=bytes(cells * 2),
        forced_log_share=bytes(cells * 2 * 2),
        forced_strongest=bytes(cells * 2),
        unobserved_log_share=bytes(cells * 2),
        total_lse=bytes(cells * 4),
        keys_read=bytes(count * len(INFO.layers) * 4),
    )


class Worker:
    """Writes steps of one endless request `r`: three decode rows and one chunk row each, with a true ledger."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self.ring = RingWriter(capacity)
        self.steps = 0
        self.tokens = RowLedger()
        self.chunks = RowLedger()

    def step(self, padding: int = 0, payload: bytes | None = None) -> None:
        """One step; `payload` replaces the encoded record, `padding` makes it longer."""
        self.steps += 1
        self.tokens.expected += 5 * INFO.heads_per_row
        self.tokens.sampled_out += 2 * INFO.heads_per_row
        self.tokens.captured += 3 * INFO.heads_per_row
        self.chunks.expected += INFO.heads_per_row
        self.chunks.captured += INFO.heads_per_row
        position = 10 + 3 * (self.steps - 1)
        starts = self.steps == 1 or padding > 0
        record = StepRecord(
            step=self.steps,
            wall_time_ns=time.time_ns(),
            ledger=Ledger(self.tokens, self.chunks, estimates=self.steps),
            rows=rows("r", position, [Phase.PREFILL_CHUNK, Phase.PREFILL_END, Phase.DECODE, Phase.DECODE]),
            started=[RequestStarted("r", 10, bytes(4), b"\2", bytes(10 + padding))] if starts else [],
            tokens=[TokenRun("r", position, bytes([self.steps % 256] * 3))],
        )
        assert self.ring.write(
            encode(record) if payload is None else payload, self.tokens.captured, self.chunks.captured
        )

    def finish(self) -> None:
        """Write that `r` is finished: a record without rows."""
        ledger = Ledger(self.tokens, self.chunks, estimates=self.steps)
        record = StepRecord(99, time.time_ns(), ledger, finished=[RequestFinished("r", 10 + 3 * self.steps)])
        assert self.ring.write(encode(record), self.tokens.captured, self.chunks.captured)


Verdict = Callable[[summary_pb2.StepSummary], "grpc.StatusCode | str | None"]
"""What a monitor makes of a summary: None to accept, a reason to refuse, a status to end the stream."""


class Monitor(IngestServiceServicer):
    """Keeps every summary it accepts, by sequence. Its memory outlives restarts of its server."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.accepted: dict[int, summary_pb2.StepSummary] = {}
        self.answers: Counter[str] = Counter()
        self.verdict: Verdict = lambda summary: None
        self.hang = threading.Event()
        self._server: grpc.Server | None = None

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        add_IngestServiceServicer_to_server(self, self._server)
        assert self._server.add_insecure_port(self.address)
        self._server.start()

    def stop(self) -> None:
        assert self._server is not None
        self.hang.clear()
        self._server.stop(None).wait()

    def Publish(
        self, request_iterator: Iterator[ingest_pb2.PublishRequest], context: grpc.ServicerContext
    ) -> Iterator[ingest_pb2.PublishResponse]:
        previous = 0
        for request in request_iterator:
            while self.hang.is_set() and context.is_active():
                time.sleep(0.01)
            summary = request.summary
            if summary.sequence <= previous:
                context.abort(grpc.StatusCode.OUT_OF_RANGE, "sequence")
            previous = summary.sequence
            verdict = self.verdict(summary)
            response = ingest_pb2.PublishResponse(sequence=summary.sequence)
            if isinstance(verdict, grpc.StatusCode):
                self.answers[verdict.name] += 1
                context.abort(verdict, "verdict")
            if summary.sequence in self.accepted:
                response.outcome = ingest_pb2.PUBLISH_OUTCOME_DUPLICATE
            elif isinstance(verdict, str):
                response.outcome, response.reason = ingest_pb2.PUBLISH_OUTCOME_REFUSED, verdict
            else:
                response.outcome = ingest_pb2.PUBLISH_OUTCOME_ACCEPTED
                self.accepted[summary.sequence] = summary
            self.answers[ingest_pb2.PublishOutcome.Name(response.outcome)] += 1
            yield response

    @property
    def rows_accepted(self) -> tuple[int, int]:
        """Token and chunk rows in accepted summaries, in the ledger's unit."""
        phases = b"".join(summary.rows.phases for summary in list(self.accepted.values()))
        chunks = phases.count(Phase.PREFILL_CHUNK)
        return (len(phases) - chunks) * INFO.heads_per_row, chunks * INFO.heads_per_row

    def ledger(self) -> tuple[Counter[str], Counter[str]]:
        """The newest ledger: token and chunk counts by "outcome" or "outcome/reason"."""
        newest = self.accepted[max(self.accepted)].ledger
        return _counts(newest.token_rows), _counts(newest.chunk_rows)

    def positions(self) -> list[int]:
        """Positions of `r` for which flags arrived, in order of arrival by sequence."""
        runs = [run for sequence in sorted(self.accepted) for run in self.accepted[sequence].tokens]
        return [run.first_position + offset for run in runs for offset in range(len(run.flags))]


def _counts(counts: "list[summary_pb2.RowCount]") -> Counter[str]:
    return Counter({f"{c.outcome}/{c.reason}" if c.reason else c.outcome: c.count for c in counts if c.count})


def check_ledger(monitor: Monitor, worker: Worker) -> tuple[Counter[str], Counter[str]]:
    """Assert that the newest ledger adds up, covers all the worker did, and counts exactly the rows that arrived."""
    ledgers = monitor.ledger()
    for ledger, truth, arrived in zip(ledgers, (worker.tokens, worker.chunks), monitor.rows_accepted, strict=True):
        assert ledger["expected"] == truth.expected
        assert ledger["expected"] == sum(ledger.values()) - ledger["expected"]
        assert ledger["captured"] == arrived
    return ledgers


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for `condition`, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.005)
