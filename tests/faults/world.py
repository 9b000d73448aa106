"""Engine workers, publishers, a monitor and a subscriber that resumes: real processes and sockets, all but the engine.

An engine's worker is stood in for by what it shares with its publisher, the ring, into which whole requests are written
as an engine does; tests/e2e and `benchmarks.soak` do the same with a real one.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import msgspec
from google.protobuf.json_format import MessageToDict
from prometheus_client.parser import text_string_to_metric_families

from stream_monitor import client
from stream_monitor.publisher.launch import PublisherProcess
from stream_monitor.records import (
    EngineInfo,
    Ledger,
    RequestFinished,
    RequestStarted,
    RowLedger,
    Rows,
    StepRecord,
    TokenRun,
    encode,
)
from stream_monitor.ring import RingWriter
from stream_monitor.target import Target
from stream_monitor.v1alpha1 import summary_pb2
from tests.monitor.conftest import until
from tests.monitor.process import MonitorProcess
from tests.monitor.synthetic import Engine, engine
from tests.monitor.test_service import SHIFTING

RING = 1 << 20


def info_of(message: summary_pb2.EngineInfo) -> EngineInfo:
    """The same as the worker's record."""
    fields = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    fields |= {"summary_bytes": 0, "kv_tokens_lost": 0}  # JSON has 64-bit numbers as text
    return msgspec.convert(fields, EngineInfo)


class EngineRank:
    """A ring with its publisher, and the account of what was written to it."""

    def __init__(self, target: str, instance: str = "", ring_bytes: int = RING) -> None:
        self.synthetic = Engine(engine(instance))
        self.ring = RingWriter(ring_bytes)
        self.rows = RowLedger()
        self.publisher = PublisherProcess(self.ring.fd, info_of(self.synthetic.info), Target(target))
        self.publisher.start()

    def request(self, name: str, targets: list[int] = SHIFTING) -> None:
        """A whole request, whose anchors shift unless told otherwise: one finding."""
        for summary in self.synthetic.request(name, targets):
            self.write(summary)

    def begin(self, name: str) -> None:
        """The same without its end."""
        for summary in self.synthetic.request(name, SHIFTING[:3])[:-1]:
            self.write(summary)

    def write(self, summary: summary_pb2.StepSummary) -> None:
        """A step into the ring, with the ledger of what came before; returns at once whatever becomes of it."""
        captured = summary.rows.count * self.synthetic.heads
        self.rows.captured += captured
        self.rows.sampled_out += 3 * captured
        self.rows.expected += 4 * captured
        columns = Rows.__struct_fields__
        rows = Rows(
            **{name: getattr(summary.rows, name) for name in columns} | {"request_ids": list(summary.rows.request_ids)}
        )
        record = StepRecord(
            summary.step,
            summary.wall_time_ns,
            Ledger(token_rows=self.rows, estimates=summary.step, stride=4),
            rows if summary.rows.count else None,
            [RequestStarted(*(getattr(s, name) for name in RequestStarted.__struct_fields__)) for s in summary.started],
            [TokenRun(t.request_id, t.first_position, t.flags, t.token_ids) for t in summary.tokens],
            [RequestFinished(f.request_id, f.total_tokens) for f in summary.finished],
        )
        assert self.ring.write(encode(record), self.rows.captured, 0)

    def stop(self) -> None:
        """The worker ends in order."""
        self.publisher.stop(10)
        self.ring.close()

    def die(self) -> None:
        """The worker is killed: its publisher's standard input ends, and nobody waits for anything."""
        self.publisher._close_pipe()
        self.ring.close()


class World:
    """The monitor in a process, ranks, and one subscriber that resumes by cursor over whatever happens."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.monitor = MonitorProcess(folder, **settings)
        self.ranks: list[EngineRank] = []
        self.heard: Counter[str] = Counter()
        """Findings that the subscriber was given, by request."""
        self.lost = 0
        """Events that the monitor told the subscriber were lost to it."""
        self._client = client.Monitor(self.monitor.address)
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        until(self._subscribed)

    def rank(self, **more: object) -> EngineRank:
        """One more engine."""
        self.ranks.append(EngineRank(self.monitor.ingest, **more))  # type: ignore[arg-type]
        return self.ranks[-1]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples that carry these labels."""
        with httpx.Client(trust_env=False, timeout=20) as http:
            text = http.get(f"http://{self.monitor.http}/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def answers(self) -> bool:
        """Whether the monitor passes a liveness probe: three of them may fail."""
        for _ in range(3):
            with suppress(httpx.HTTPError), httpx.Client(trust_env=False, timeout=5) as http:
                return http.get(f"http://{self.monitor.http}/healthz").status_code == httpx.codes.OK
        return False

    def account_is_whole(self) -> bool:
        """Whether the monitor is there, and its rows are all that the ranks expected, each with an outcome."""
        expected = sum(rank.rows.expected for rank in self.ranks)
        try:
            told = self.metric("stream_monitor_rows_expected_total"), self.metric("stream_monitor_rows_total")
        except httpx.HTTPError:
            return False
        return told == (expected, expected)

    def wait_heard(self, *names: str, seconds: float = 30) -> None:
        """Until the subscriber has a finding of each of these requests; then that it has no more than one of any."""
        until(lambda: set(names) <= self.heard.keys(), seconds)
        assert set(self.heard.values()) <= {1}, "an event came twice"

    def settle(self) -> None:
        """Until nothing is in flight: all that was expected has an outcome."""
        until(self.account_is_whole, 30)

    def close(self) -> None:
        """End everything that still runs."""
        self._client.close()
        for rank in self.ranks:
            rank.publisher.stop(0)
        self.monitor.kill()

    def _listen(self) -> None:
        for received in self._client.subscribe():
            self.lost += received.lost
            self.heard[received.event.external_id] += 1

    def _subscribed(self) -> bool:
        return self.metric("stream_monitor_subscribers") == 1


@contextmanager
def world(folder: Path, **settings: object) -> Iterator[World]:
    """A world, ended in any case."""
    made = World(folder, **settings)
    try:
        yield made
    finally:
        made.close()
