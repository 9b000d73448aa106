"""A monitor process as an operator starts it, and a real browser that looks at its page."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc, monitor_pb2, monitor_pb2_grpc, summary_pb2
from tests.monitor.spoken import byte_level

TIMEOUT = 20
CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


class Monitor:
    """`stream-monitor serve` in `folder`, on ports that stay the same across restarts."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._folder = folder
        self._arguments = arguments
        self.grpc, self.http = "127.0.0.1:0", "127.0.0.1:0"
        self.start()

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def start(self) -> None:
        ingest = f"unix:{self._folder / 'ingest.sock'}"
        command = [sys.executable, "-m", "stream_monitor", "serve", "--ingest", ingest]
        command += ["--grpc", self.grpc, "--http", self.http, *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=self._folder)
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        assert ready.startswith("ready:"), ready
        self.ingest, self.grpc, self.http = (part.split()[-1] for part in ready.strip().split(", "))
        self._channel = grpc.insecure_channel(self.grpc, [("grpc.use_local_subchannel_pool", 1)])
        self.api = monitor_pb2_grpc.MonitorServiceStub(self._channel)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self._channel.close()
        self._process.send_signal(number)
        self._process.communicate(timeout=TIMEOUT)

    def publish(self, summaries: Sequence[summary_pb2.StepSummary]) -> None:
        """On a stream of its own; all are accepted."""
        with grpc.insecure_channel(self.ingest, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            requests = (ingest_pb2.PublishRequest(summary=summary) for summary in summaries)
            answers = list(ingest_pb2_grpc.IngestServiceStub(channel).Publish(requests, timeout=TIMEOUT))
        assert {answer.outcome for answer in answers} == {ingest_pb2.PUBLISH_OUTCOME_ACCEPTED}

    def trace(self, request_id: str) -> monitor_pb2.GetTraceResponse:
        return self.api.GetTrace(monitor_pb2.GetTraceRequest(request_id=request_id), timeout=TIMEOUT)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Monitor]]:
    """Starts monitor processes, with more arguments if given."""
    running: list[Monitor] = []

    def start(*arguments: str) -> Monitor:
        running.append(Monitor(tmp_path, *arguments))
        return running[-1]

    yield start
    for each in running:
        each.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Iterator[Monitor]:
    """One monitor that can read the text, for tests that look at a request of their own."""
    yield (running := Monitor(tmp_path_factory.mktemp("monitor"), "--tokenizers", str(tokenizer)))
    running.stop()


@pytest.fixture
def monitor(start: Callable[..., Monitor], tokenizer: Path) -> Monitor:
    """A monitor that can read the text."""
    return start("--tokenizers", str(tokenizer))


# Not for the session: while Playwright runs, no other test of this process could start an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield (started := playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS))
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose test fails if it raised an error, was denied something by its policy, or asked another origin."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    opened.set_default_timeout(TIMEOUT * 1000)
    errors: list[str] = []
    origins: set[str] = set()
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on(
        "console",
        # Plotly's bundled map library tries to add a style as it loads; the policy says no, and no map is drawn here.
        lambda message: (
            "Content Security Policy" in message.text
            and not message.location["url"].endswith("/static/plotly.js")
            and errors.append(message.text)
        ),
    )
    opened.on("request", lambda request: origins.add("/".join(request.url.split("/")[:3])))
    yield opened
    urls = {"/".join(opened.url.split("/")[:3])}
    context.close()
    assert errors == []
    assert origins - {"data:"} <= urls, "the page asked another origin"
