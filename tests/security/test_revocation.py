"""A credential that is taken back ends the streams it opened, of that principal alone."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from stream_monitor.client import Monitor, MonitorError, Target
from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc, monitor_pb2
from tests.monitor.conftest import TIMEOUT
from tests.monitor.synthetic import Engine
from tests.monitor.test_service import SHIFTING
from tests.security.guarded import SCRAPER, Guarded, as_, principal, token_of, wait_until

ENGINE = principal("engine", publish="*")


def subscribed(monitor: Guarded, name: str) -> grpc.Call:
    stream = monitor.monitor().Subscribe(monitor_pb2.SubscribeRequest(), metadata=as_(name), timeout=TIMEOUT)
    next(stream)
    return stream


def ended(stream: grpc.Call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        next(stream)  # type: ignore[call-overload]
    return raised.value.code(), raised.value.details()  # type: ignore[attr-defined]


def test_streams_of_a_token_that_was_taken_back_end(start: Callable[..., Guarded], tmp_path: Path) -> None:
    readers = {name: principal(name, subscribe="*") for name in ("stays", "goes", "changes")}
    monitor = start(SCRAPER + ENGINE + "".join(readers.values()))
    streams = {name: subscribed(monitor, name) for name in readers}
    publisher = ingest_pb2_grpc.IngestServiceStub(monitor.open(address=monitor.server.ingest_address)).Publish(
        iter([ingest_pb2.PublishRequest(summary=Engine().summary())]), metadata=as_("goes"), timeout=TIMEOUT
    )
    assert publisher.code() is grpc.StatusCode.PERMISSION_DENIED
    with (
        monitor.browser() as client,
        client.stream("GET", "/api/events", headers=dict(as_("goes"))) as page,
    ):
        lines = page.iter_lines()
        assert next(lines).startswith("retry")
        changed = principal("changes", subscribe=["acme"])
        (tmp_path / "access.toml").write_text(SCRAPER + ENGINE + readers["stays"] + changed)
        assert ended(streams["goes"]) == (grpc.StatusCode.UNAUTHENTICATED, "your credential was taken back")
        assert ended(streams["changes"]) == (grpc.StatusCode.UNAVAILABLE, "your rights changed; connect again")
        # It ends as a response should: a browser asks again, and is told to sign in.
        assert [line for line in lines if line.startswith("event: error")] == []
    assert monitor.get("/api/events", "goes").status_code == 401
    monitor.tell(Engine().request("a", SHIFTING), "engine")
    assert next(streams["stays"]).event.key.request_id == "a"  # type: ignore[call-overload]


def test_a_client_goes_on_with_the_token_that_replaced_its_own(start: Callable[..., Guarded], tmp_path: Path) -> None:
    """Both the monitor and the client read their files again; nobody is restarted, and nothing is missed."""
    monitor = start(SCRAPER + ENGINE + principal("reader", subscribe="*"))
    token = tmp_path / "token"
    token.write_text(token_of("reader"))
    with Monitor(Target(monitor.server.grpc_address, token_file=str(token))) as client:
        monitor.tell(Engine().request("a", SHIFTING), "engine")
        received = client.subscribe(last=1)
        assert next(received).event.key.request_id == "a"
        token.write_text("another-token-0123456789")
        renewed = principal("reader", 'token = "another-token-0123456789"', subscribe="*")
        (tmp_path / "access.toml").write_text(SCRAPER + ENGINE + renewed)
        wait_until(
            lambda: monitor.metric("stream_monitor_access_reloads_total", file="access", outcome="done") == 1,
        )
        monitor.tell(Engine().request("b", SHIFTING), "engine")
        assert next(received).event.key.request_id == "b"
        # With one that nobody knows it is over, and says so.
        token.write_text("unknown-token-0123456789")
        with pytest.raises(MonitorError, match="the token is nobody's who has access"):
            list(client.list_requests())
