"""The stream as others see it, and what a monitor and the fleet do with one that is not as they would make it."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nats.js import JetStreamContext, api
from nats.js.errors import NotFoundError

from stream_monitor.v1alpha1 import monitor_pb2
from tests.docs.blocks import ROOT, blocks
from tests.monitor.conftest import Running, starter
from tests.monitor.fleet.broker import STREAM, NatsServer
from tests.monitor.fleet.processes import SHIFTING, FleetProcess, until
from tests.monitor.synthetic import Engine

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    yield from starter(tmp_path)


def sent(monitor: Running, **labels: str) -> float:
    return monitor.metric("stream_monitor_nats_sent_total", **labels)


@pytest.mark.parametrize("store", ["", "monitor.db"])
def test_the_program_of_the_page_reads_findings(
    store: str, monitor: Callable[..., Running], broker: NatsServer, tmp_path: Path
) -> None:
    running = monitor(nats=broker.url, store=store and str(tmp_path / "store" / store))
    running.publish(Engine().request("chatcmpl-my-req-1-0a1b2c3d", SHIFTING))
    until(lambda: sent(running) == 2)
    (program,) = (block.text for block in blocks(ROOT / "docs" / "fleet.md") if block.language == "python")
    reading = subprocess.Popen(
        [sys.executable, "-c", program.replace("nats://127.0.0.1:4222", broker.url)], stdout=subprocess.PIPE, text=True
    )
    assert reading.stdout is not None
    line = reading.stdout.readline()
    reading.kill()
    reading.communicate()
    assert re.match(r"ANCHOR_SHIFT chatcmpl-my-req-1 at sentence \d+ the anchors moved ", line)


def test_subjects_and_headers_are_those_of_the_page(monitor: Callable[..., Running], broker: NatsServer) -> None:
    running = monitor(nats=broker.url)
    rank = Engine()
    rank.info.model_name, rank.info.engine = "Qwen/Qwen2.5 *>", "0"
    running.publish(rank.request("chatcmpl-a b\u00fc-0a1b2c3d", SHIFTING))
    until(lambda: sent(running) == 2)

    async def held(context: JetStreamContext) -> list[api.RawStreamMsg]:
        return [await context.get_msg(STREAM, seq=sequence) for sequence in (1, 2)]

    page = (ROOT / "docs" / "fleet.md").read_text()
    for message in broker.ask(held):
        stream, record, model_name, engine, request = message.subject.split(".")
        assert (stream, model_name, engine) == (STREAM, "Qwen%2FQwen2%2E5%20%2A%3E", "0")
        assert re.fullmatch("[0-9a-f]{32}", request)
        assert f"`{STREAM}.{record}.<model>.<engine>.<request>`" in page
        assert message.headers["Stream-Monitor-Request"] == "chatcmpl-a%20b%C3%BC"
        assert all(f"`{name}`" in page for name in message.headers)
        assert b"chatcmpl" not in message.subject.encode()
    for name in ("Stream-Monitor-Without", "Stream-Monitor-Kind"):
        assert f"`{name}`" in page


def test_a_finding_that_comes_again_after_long_is_left_out_and_removed(
    monitor: Callable[..., Running], broker: NatsServer, fleet: Callable[..., FleetProcess]
) -> None:
    async def make(context: JetStreamContext) -> None:
        config = api.StreamConfig(name=STREAM, subjects=[f"{STREAM}.>"], duplicate_window=0.1, max_age=7 * 86_400)
        await context.add_stream(config)

    broker.ask(make)
    one = fleet("one")
    start = next(one.follow()).cursor
    running = monitor(nats=broker.url)
    running.publish(Engine().request("chatcmpl-r-0a1b2c3d", SHIFTING))
    until(lambda: one.metric("position") == 2)

    async def repeat(context: JetStreamContext) -> int:
        first = await context.get_msg(STREAM, subject=f"{STREAM}.finding.*.*.*")
        while True:
            # Until the broker no longer knows it.
            again = await context.publish(first.subject, first.data, headers=dict(first.headers))
            if not again.duplicate:
                return again.seq

    sequence = broker.ask(repeat)
    until(lambda: one.metric("messages_total", outcome="duplicate") == 1, one.log.read_text)
    running.publish(Engine().request("chatcmpl-s-0a1b2c3d", SHIFTING))
    assert one.read(start, 2)[0] == ["chatcmpl-r", "chatcmpl-s"]

    async def held(context: JetStreamContext) -> set[str]:
        """Records and sequences of what the stream holds, in short."""
        found = set()
        for number in range(1, (await context.stream_info(STREAM)).state.last_seq + 1):
            with contextlib.suppress(NotFoundError):
                found.add(f"{(await context.get_msg(STREAM, seq=number)).subject.split('.')[1]} {number}")
        return found

    expected = {"finding 1", "trace 2", f"finding {sequence + 1}", f"trace {sequence + 2}"}
    until(lambda: broker.ask(held) == expected, lambda: broker.ask(held))


def test_what_is_none_of_ours_is_counted_and_left_out(
    monitor: Callable[..., Running], broker: NatsServer, fleet: Callable[..., FleetProcess]
) -> None:
    one = fleet("one")

    async def write(context: JetStreamContext) -> None:
        packed = {"Content-Encoding": "deflate"}
        await context.publish(f"{STREAM}.nonsense", b"x")
        await context.publish(f"{STREAM}.finding.m.0.{'0' * 32}", b"\xff\xff")
        await context.publish(f"{STREAM}.finding.m.0.{'0' * 32}", monitor_pb2.Event(model_name="m").SerializeToString())
        await context.publish(f"{STREAM}.trace.m.0.{'0' * 32}", b"not packed", headers=packed)
        await context.publish(f"{STREAM}.deleted.{'x' * 32}", b"")

    broker.ask(write)
    until(lambda: one.metric("messages_total", outcome="malformed") == 5, one.log.read_text)
    monitor(nats=broker.url).publish(Engine().request("chatcmpl-r-0a1b2c3d", SHIFTING))
    until(lambda: one.ids() == ["chatcmpl-r"], one.log.read_text)


class Limited:
    """Brokers that take small messages alone."""

    def __init__(self, folder: Path, payload: int) -> None:
        self.server = NatsServer(folder, f"max_payload: {payload}").start()

    def traces(self) -> list[api.RawStreamMsg]:
        async def held(context: JetStreamContext) -> list[Any]:
            state = (await context.stream_info(STREAM)).state
            found = [await context.get_msg(STREAM, seq=sequence) for sequence in range(1, state.last_seq + 1)]
            return [each for each in found if ".trace." in each.subject]

        return self.server.ask(held)


@pytest.mark.parametrize(("payload", "becomes"), [(4200, "shortened"), (3000, "too_large")])
def test_a_trace_too_large_for_the_broker(
    payload: int, becomes: str, monitor: Callable[..., Running], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limited = Limited(tmp_path, payload)
    try:
        running = monitor(nats=limited.server.url)
        running.publish(Engine().request("chatcmpl-r-0a1b2c3d", [4 + 6 * (n % 9) for n in range(120)]))
        if becomes == "shortened":
            until(lambda: sent(running, record="trace") == 1, lambda: caplog.text)
            (message,) = limited.traces()
            assert message.headers["Stream-Monitor-Without"] == "heads"
            assert running.metric("stream_monitor_nats_shortened_total") == 1
        else:
            until(lambda: running.metric("stream_monitor_nats_lost_total", record="trace", reason="too_large") == 1)
            assert re.search(r"a trace was not published: \d+ bytes, and the broker takes 3000; raise ", caplog.text)
            assert limited.traces() == []
        assert "chatcmpl-r" not in caplog.text
    finally:
        limited.server.end()
