"""A real monitor under attack, and what must hold of it: it lives, serves others, does not grow, and says what it
refuses."""

import time
from pathlib import Path

import grpc
import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from stream_monitor.v1alpha1 import ingest_pb2, monitor_pb2
from tests.monitor import synthetic
from tests.monitor.process import LOCAL, MonitorProcess

SECONDS = 15.0
"""In which any request of others must be answered meanwhile; on a busy machine."""
GROWTH_BYTES = 48 << 20
LIMITS = {"max_traces": 200, "max_trace_bytes": 8 << 20, "event_log": 1000, "store_bytes": 8 << 20, "max_engines": 64}
TARGETS = [3, 9, 3, 9, 3, 9, 3, 9, 3, 9, 5, 5, 5, 5, 5, 5]
"""Prompt tokens that the sentences of a sound request look at."""


class Target:
    """One monitor, attacked by several."""

    def __init__(self, folder: Path) -> None:
        self.process = MonitorProcess(folder, **LIMITS)
        self.ingest = grpc.insecure_channel(self.process.ingest, LOCAL)
        self.faults = 0
        """Messages that ended their stream so far."""
        self._sound = 0
        self._resident = 0

    def settled(self) -> None:
        """What is there to begin with is there: memory is measured from here."""
        self.serves()
        self._resident = self._memory()

    def publish(self, messages: list[bytes], seconds: float = SECONDS) -> tuple[int, grpc.StatusCode, str]:
        """One stream of raw messages: answers, and how it ended."""
        method = self.ingest.stream_stream(
            "/stream_monitor.v1alpha1.IngestService/Publish",
            request_serializer=None,
            response_deserializer=ingest_pb2.PublishResponse.FromString,
        )
        call = method(iter(messages), timeout=seconds)
        answers = 0
        try:
            for _ in call:
                answers += 1
        except grpc.RpcError as error:
            return answers, error.code(), error.details() or ""
        return answers, grpc.StatusCode.OK, ""

    def serves(self) -> float:
        """A sound request of an engine of its own gives the trace that it must; seconds that it took."""
        self._sound += 1
        name = f"chatcmpl-sound-{self._sound}-00000000"
        sender = synthetic.Engine()
        raw = [
            ingest_pb2.PublishRequest(summary=summary).SerializeToString()
            for summary in sender.request(name, TARGETS, prompt=72)
        ]
        begun = time.monotonic()
        answers, code, details = self.publish(raw)
        assert (answers, code) == (len(raw), grpc.StatusCode.OK), details
        trace = self.process.api.GetTrace(monitor_pb2.GetTraceRequest(request_id=name), timeout=SECONDS)
        seconds = time.monotonic() - begun
        assert seconds < SECONDS
        assert trace.info.rows_kept == 3 * len(TARGETS)
        assert trace.info.state == monitor_pb2.REQUEST_STATE_FINISHED
        assert [sentence.first_token for sentence in trace.sentences] == list(range(0, 72 + 6 * len(TARGETS), 6))
        assert trace.info.top_anchor.sentence.index == TARGETS[-1] // 6
        return seconds

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples with these labels."""
        with httpx.Client(trust_env=False, timeout=SECONDS) as client:
            text = client.get(f"http://{self.process.http}/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def check(self) -> int:
        """After an attack; bytes that the monitor takes more than before."""
        self.serves()
        assert self.process.process is not None
        assert self.process.process.poll() is None, self.process.log.read_text()
        said = self.process.log.read_text()
        assert "Traceback" not in said, said
        assert " ERROR " not in said, said
        assert self.metric("stream_monitor_messages_total", outcome="invalid") == self.faults
        grown = self._memory() - self._resident
        assert grown < GROWTH_BYTES, f"{grown >> 20} MiB more than before"
        return grown

    def close(self) -> None:
        """End it."""
        self.ingest.close()
        self.process.stop()

    def _memory(self) -> int:
        assert self.process.process is not None
        return int(psutil.Process(self.process.process.pid).memory_info().rss)
