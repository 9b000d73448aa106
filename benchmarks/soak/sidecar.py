"""The monitor under test, and a subscriber that goes on by cursor whatever happens to it."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families

from stream_monitor import client
from stream_monitor.v1alpha1 import monitor_pb2
from tests.faults.proxy import Proxy
from tests.monitor.process import MonitorProcess, free_port

RECOVERY_SECONDS = 120.0
"""Longest until all is well again after a fault: a cut connection is given up after 30 seconds."""
MOST_ASKED = 1000
"""Findings that a subscriber may ask for at a time."""
Known = tuple[str, str, int, int, int]
"""A finding: engine instance, request, kind, sentence, time of the engine's step."""


def known(event: monitor_pb2.Event) -> Known:
    """What a finding is told apart by."""
    key = event.key
    return key.engine_instance, key.request_id, event.kind, event.sentence.index, event.wall_time_ns


@dataclass
class Heard:
    """What the subscriber was given.

    Attributes:
        findings: how often it was given each.
        lost: events that it was told were lost to it.
        gaps: times that it was told any number may be missing.
        since: findings after the last gap, in order.
    """

    findings: Counter[Known] = field(default_factory=Counter)
    lost: int = 0
    gaps: int = 0
    since: list[Known] = field(default_factory=list)


class Sidecar:
    """The monitor in a process of its own, behind a proxy on TCP, with its subscriber."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        ingest = f"127.0.0.1:{free_port()}"
        self.process = MonitorProcess(folder, ingest=ingest, tokenizers=str(tokenizer))
        self.proxy = Proxy(ingest)
        self.heard = Heard()
        self._client = client.Monitor(self.process.address)
        self._thread: threading.Thread | None = None

    @property
    def target(self) -> str:
        """For engines."""
        return self.proxy.address

    def listen(self) -> None:
        """Begin to subscribe."""
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        wait_for(lambda: self.metric("stream_monitor_subscribers") == 1)

    def restart_with(self, **settings: object) -> None:
        """Stop in order, and start with more settings."""
        self.process.stop()
        self.process.start(**settings)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples that carry these labels; NaN while nobody answers."""
        try:
            with httpx.Client(trust_env=False, timeout=20) as http:
                text = http.get(f"http://{self.process.http}/metrics").text
        except httpx.HTTPError:
            return float("nan")
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def trace(self, request_id: str, instance: str) -> monitor_pb2.GetTraceResponse:
        """A request of this engine."""
        return self._client.get_trace(request_id, engine_instance=instance).message

    def forgotten(self) -> set[Known]:
        """Findings that were received since the last gap and cannot be asked for again."""
        wanted = set(self.heard.since[-MOST_ASKED // 2 :])
        try:
            for response in self.process.api.Subscribe(monitor_pb2.SubscribeRequest(last=MOST_ASKED), timeout=20):
                wanted.discard(known(response.event))
                if not wanted:
                    break
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        return wanted

    def close(self) -> None:
        """End everything."""
        self._client.close()
        self.proxy.close()
        self.process.kill()

    def _listen(self) -> None:
        for received in self._client.subscribe():
            heard, finding = self.heard, known(received.event)
            heard.lost += received.lost
            if received.gap:
                heard.gaps += 1
                heard.since.clear()
            heard.since.append(finding)
            heard.findings[finding] += 1


def wait_for(holds: Callable[[], bool], seconds: float = RECOVERY_SECONDS) -> bool:
    """Whether a condition comes to hold within that time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
