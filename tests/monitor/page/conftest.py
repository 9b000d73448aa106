"""A monitor process as an operator starts it, and a real browser that looks at its page."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.process import MonitorProcess
from tests.monitor.spoken import byte_level

TIMEOUT = 60
CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


class Monitor(MonitorProcess):
    """The process, and what the tests ask it over gRPC."""

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def trace(self, request_id: str) -> monitor_pb2.GetTraceResponse:
        return self.api.GetTrace(monitor_pb2.GetTraceRequest(request_id=request_id), timeout=TIMEOUT)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Monitor]]:
    """Starts monitor processes, settings given by name."""
    running: list[Monitor] = []

    def start(**settings: object) -> Monitor:
        running.append(Monitor(tmp_path, **settings))
        return running[-1]

    yield start
    for each in running:
        each.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Iterator[Monitor]:
    """One monitor that can read the text, for tests that look at a request of their own."""
    yield (running := Monitor(tmp_path_factory.mktemp("monitor"), tokenizers=tokenizer))
    running.stop()


@pytest.fixture
def monitor(start: Callable[..., Monitor], tokenizer: Path) -> Monitor:
    """A monitor that can read the text."""
    return start(tokenizers=tokenizer)


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
