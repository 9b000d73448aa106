"""Limits: what is too much is refused under a name and counted, and others are served meanwhile."""

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from stream_monitor.monitor.access import http_protocol, refusals
from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc, monitor_pb2
from tests.monitor.conftest import TIMEOUT
from tests.monitor.synthetic import Engine
from tests.security.guarded import SCRAPER, Guarded, as_, code_of, principal, wait_until

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
MESSAGES = "stream_monitor_messages_total"


def listed(monitor: Guarded) -> grpc.StatusCode:
    return code_of(lambda: monitor.monitor().ListRequests(monitor_pb2.ListRequestsRequest(), timeout=TIMEOUT))


@contextlib.contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), TIMEOUT) as connection:
        yield connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    connection.settimeout(TIMEOUT)
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def test_a_publisher_that_floods_is_refused_and_others_are_not(start: Callable[..., Guarded]) -> None:
    monitor = start(max_message_rate=2)
    # Not in the midst of it.
    monitor.server.intake._rates_from += 1000
    flooding = Engine()
    answers = monitor.tell([flooding.summary() for _ in range(50)])
    assert [answer.outcome for answer in answers[:20]] == [ingest_pb2.PUBLISH_OUTCOME_ACCEPTED] * 20
    assert {(answer.outcome, answer.reason) for answer in answers[20:]} == {
        (ingest_pb2.PUBLISH_OUTCOME_REFUSED, "message_rate")
    }
    assert monitor.metric(MESSAGES, outcome="refused", reason="message_rate") == 30
    # What is refused came all the same: it is not counted as lost on the way.
    assert monitor.metric("stream_monitor_messages_lost_total") == 0
    assert monitor.tell([Engine().summary()])[0].outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED
    # And again when it has calmed down.
    monitor.server.intake._rates_from -= 2000
    wait_until(
        lambda: monitor.tell([flooding.summary()])[0].outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED,
        "the rate is counted anew",
    )


def test_an_oversized_message_ends_its_own_stream(start: Callable[..., Guarded]) -> None:
    monitor = start(max_message_bytes=1 << 16)
    summary = Engine().summary()
    summary.ledger.fault = "x" * (1 << 17)
    assert code_of(lambda: monitor.tell([summary])) is EXHAUSTED
    assert monitor.metric(MESSAGES, outcome="invalid", reason="oversized") == 1
    assert monitor.tell([Engine().summary()])[0].outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED


def test_calls_of_a_method_are_limited(start: Callable[..., Guarded]) -> None:
    monitor = start(max_calls=2)
    streams = [monitor.monitor().Subscribe(monitor_pb2.SubscribeRequest()) for _ in range(3)]
    ended = [code_of(lambda stream=stream: next(stream)) for stream in streams]  # type: ignore[misc]
    # Which of three that come at a time is the third, is the network's to say.
    assert sorted(ended, key=lambda code: code.name) == [grpc.StatusCode.OK] * 2 + [EXHAUSTED]
    assert monitor.refused("grpc", "too_many_calls") == 1
    assert listed(monitor) is grpc.StatusCode.OK
    streams[ended.index(grpc.StatusCode.OK)].cancel()
    again = monitor.monitor()
    wait_until(lambda: code_of(lambda: next(again.Subscribe(monitor_pb2.SubscribeRequest()))) is grpc.StatusCode.OK)


def test_calls_that_cannot_be_read_are_named_and_counted(start: Callable[..., Guarded]) -> None:
    monitor = start()
    method = f"/{monitor_pb2.DESCRIPTOR.services_by_name['MonitorService'].full_name}/"
    with monitor.open() as channel:
        once = channel.unary_unary(method + "GetTrace")
        stream = channel.unary_stream(method + "Subscribe")
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        assert code_of(lambda: once(b"\xff\xff", timeout=TIMEOUT)) is invalid
        assert code_of(lambda: next(stream(b"\xff\xff", timeout=TIMEOUT))) is invalid
    assert monitor.refused("grpc", "unreadable") == 2
    assert listed(monitor) is grpc.StatusCode.OK


def test_one_principal_does_not_take_all_subscriptions(start: Callable[..., Guarded]) -> None:
    monitor = start(
        SCRAPER + principal("greedy", subscribe="one") + principal("other", subscribe="two"),
        max_principal_subscribers=2,
    )
    stub = monitor.monitor()

    def subscribed(name: str) -> grpc.StatusCode:
        stream = stub.Subscribe(monitor_pb2.SubscribeRequest(), metadata=as_(name), timeout=TIMEOUT)
        held.append(stream)
        return code_of(lambda: next(stream))

    held: list[object] = []
    assert [subscribed("greedy") for _ in range(3)] == [grpc.StatusCode.OK] * 2 + [EXHAUSTED]
    assert subscribed("other") is grpc.StatusCode.OK
    # A live page is a subscription too.
    assert monitor.get("/api/events", "greedy").status_code == 503


def test_metadata_is_bounded(start: Callable[..., Guarded]) -> None:
    monitor = start()
    large = (("x-large", "x" * 20_000),)
    asked = monitor_pb2.ListRequestsRequest()
    assert code_of(lambda: monitor.monitor().ListRequests(asked, timeout=TIMEOUT, metadata=large)) is EXHAUSTED
    assert listed(monitor) is grpc.StatusCode.OK


def test_headers_are_bounded(start: Callable[..., Guarded]) -> None:
    monitor = start()
    with connected(monitor.server.http_address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nx-large: " + b"x" * 40_000)
        assert rest(connection).startswith(b"HTTP/1.1 431 ")
    assert monitor.refused("http", "too_large") == 1
    assert monitor.get("/api/requests").status_code == 200


def test_what_is_no_request_is_counted_and_fills_no_log(
    start: Callable[..., Guarded], caplog: pytest.LogCaptureFixture
) -> None:
    monitor = start()
    for _ in range(20):
        with connected(monitor.server.http_address) as connection:
            connection.sendall(b"\x16\x03\x01 no request\r\n\r\n")
            assert rest(connection).startswith(b"HTTP/1.1 400 ")
    assert monitor.refused("http", "not_http") == 20
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("refused over http: not_http (127.0.0.1:")
    assert monitor.get("/api/requests").status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_body_that_breaks_off_is_refused_and_is_no_error(
    start: Callable[..., Guarded], caplog: pytest.LogCaptureFixture, method: str
) -> None:
    monitor = start()
    with connected(monitor.server.http_address) as connection:
        head = f"{method} /api/requests HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"5\r\nabcdexx")
        assert rest(connection).startswith(b"HTTP/1.1 400 ")
    assert monitor.refused("http", "not_http") == 1
    assert len(caplog.messages) == 1, caplog.messages
    assert monitor.get("/api/requests").status_code == 200


def test_the_page_of_security_has_every_reason() -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([a-z, ]+) \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(reason, ", ".join(where), text) for reason, (where, text) in refusals.REASONS.items()]


def test_a_slow_request_is_not_waited_for(start: Callable[..., Guarded], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "REQUEST_SECONDS", 3.0)
    monitor = start()
    with contextlib.ExitStack() as stack:
        silent, slow, half = (stack.enter_context(connected(monitor.server.http_address)) for _ in range(3))
        half.sendall(b"POST /api/signin HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        for byte in b"GET / HTTP":
            slow.sendall(bytes([byte]))
            time.sleep(0.05)
        assert monitor.get("/api/requests").status_code == 200
        for connection in (silent, slow, half):
            assert rest(connection).startswith(b"HTTP/1.1 408 ")
    assert monitor.refused("http", "too_slow") == 3


def test_connections_are_limited(start: Callable[..., Guarded]) -> None:
    monitor = start(max_connections=3)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(connected(monitor.server.http_address))
            connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        fourth = stack.enter_context(connected(monitor.server.http_address))
        assert rest(fourth).startswith(b"HTTP/1.1 503 ")
        # gRPC has connections of its own.
        assert listed(monitor) is grpc.StatusCode.OK
    assert monitor.refused("http", "too_many_connections") == 1
    wait_until(lambda: monitor.get("/healthz").status_code == 200)


def test_grpc_connections_are_limited(start: Callable[..., Guarded]) -> None:
    monitor = start(max_connections=3)
    open_channels = [monitor.open(address=monitor.server.ingest_address) for _ in range(3)]
    streams = []
    for channel in open_channels:
        publish = ingest_pb2_grpc.IngestServiceStub(channel).Publish
        summary = Engine().summary()
        stream = publish(iter([ingest_pb2.PublishRequest(summary=summary)]), timeout=TIMEOUT)
        assert next(stream).outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED
        streams.append(stream)
    assert code_of(lambda: monitor.tell([Engine().summary()])) is grpc.StatusCode.UNAVAILABLE
    for channel in open_channels:
        channel.close()
    wait_until(lambda: code_of(lambda: monitor.tell([Engine().summary()])) is grpc.StatusCode.OK)
