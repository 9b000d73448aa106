"""What keeps a monitor or a process of the fleet from its broker: one clear line each, a count, and it serves on."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from nats.js import JetStreamContext, api
from typer.testing import CliRunner

from stream_monitor.cli import app
from stream_monitor.config import MonitorSettings
from stream_monitor.monitor.archive import ERASE_SECONDS
from stream_monitor.monitor.fleet.broker import Broker, BrokerTrouble
from tests.monitor.conftest import Running, starter
from tests.monitor.fleet.broker import STREAM, NatsServer
from tests.monitor.fleet.processes import SHIFTING, FleetProcess, until
from tests.monitor.process import free_port
from tests.monitor.synthetic import Engine
from tests.test_docs import documented_metrics, shown_metrics

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    yield from starter(tmp_path)


def failures(monitor: Running, reason: str) -> float:
    return monitor.metric("stream_monitor_nats_failures_total", reason=reason)


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("", "nats: Value error, a fleet reads from a broker: nats://host:port or tls://host:port"),
        ("127.0.0.1:4222", "nats: Value error, must be nats://host:port or tls://host:port"),
        ("nats://127.0.0.1", "nats: Value error, must be nats://host:port"),
        ("nats://127.0.0.1:4222,http://b:1", "nats: Value error, must be nats://host:port"),
        ("nats://me:s3cret@127.0.0.1:4222", "nats: Value error, credentials do not belong in an address"),
        ("nats://broker.example:4222", "nats: nats://broker.example:4222 is another host, without TLS"),
    ],
)
def test_an_address_that_cannot_be_used(url: str, line: str) -> None:
    refused = CliRunner().invoke(app, ["fleet", "--nats", url, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"])
    assert refused.exit_code == 2
    assert len(refused.output.splitlines()) == 1
    assert refused.output.startswith(f"stream-monitor: {line}")
    assert "s3cret" not in refused.output


@pytest.mark.parametrize(
    ("setting", "content", "line"),
    [
        ("nats_credentials", None, "nats_credentials: cannot read"),
        ("nats_credentials", "a\nb", "nats_credentials: FILE must be a .creds file, or one line"),
        ("nats_ca", None, "nats_ca: no file"),
        ("nats_certificate", "x", "nats_certificate and nats_key belong together"),
        ("nats_ca", "x", "nats_ca, nats_certificate, nats_key: cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used(setting: str, content: str | None, line: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_text(content)
    flags = ["--nats", "nats://127.0.0.1:4222", f"--{setting.replace('_', '-')}", str(file)]
    addresses = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--fleet-store", str(tmp_path / "fleet.db")]
    refused = CliRunner().invoke(app, ["fleet", *flags, *addresses])
    assert refused.exit_code == 2
    assert len(refused.output.splitlines()) == 1
    assert refused.output.startswith(f"stream-monitor: {line.replace('FILE', str(file))}")


def test_a_file_that_may_not_be_looked_at(closed_folder: Path, tmp_path: Path) -> None:
    file = closed_folder / "ca.pem"
    flags = ["--nats", "nats://127.0.0.1:4222", "--nats-ca", str(file), "--fleet-store", str(tmp_path / "fleet.db")]
    refused = CliRunner().invoke(app, ["fleet", *flags, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"])
    assert refused.exit_code == 2
    assert refused.output == f"stream-monitor: nats_ca: cannot look at {file}: Permission denied\n"


def test_a_monitors_store_is_not_a_fleets(monitor: Callable[..., Running], broker: NatsServer, tmp_path: Path) -> None:
    running = monitor(store=str(tmp_path / "store" / "monitor.db"))
    running.publish(Engine().request("chatcmpl-r-0a1b2c3d", SHIFTING))
    running.stop()
    flags = ["--nats", broker.url, "--fleet-store", str(tmp_path / "store" / "monitor.db")]
    began = time.monotonic()
    refused = CliRunner().invoke(app, ["fleet", *flags, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"])
    assert refused.exit_code == 2
    assert time.monotonic() - began < ERASE_SECONDS, "what was refused is not waited for"
    assert "is the store of a monitor; name another file with --fleet-store" in refused.output


def test_nobody_there(monitor: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    running = monitor(nats=f"nats://127.0.0.1:{free_port()}")
    until(lambda: failures(running, "unreachable") > 0)
    assert re.search(r"nats://127\.0\.0\.1:\d+: no broker answers: .*; it is tried again", caplog.text)
    assert running.metric("stream_monitor_nats_up") == 0
    running.publish(Engine().request("chatcmpl-r-0a1b2c3d", SHIFTING))
    assert running.metric("stream_monitor_events_total", kind="ANCHOR_SHIFT") == 1
    assert running.metric("stream_monitor_nats_outbox_records") == 2


@pytest.mark.parametrize("login", ["me:right", "me:wrong", "", "token"])
def test_credentials(
    login: str, monitor: Callable[..., Running], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = NatsServer(tmp_path, 'authorization { user: me, password: "right" }').start()
    try:
        (tmp_path / "login").write_text(f"{login}\n")
        running = monitor(nats=server.url, nats_credentials=str(tmp_path / "login") if login else "")
        if login == "me:right":
            until(lambda: running.metric("stream_monitor_nats_up") == 1, lambda: caplog.text)
        else:
            until(lambda: failures(running, "credentials") > 0, lambda: caplog.text)
            assert "the broker refused our credentials (setting nats_credentials)" in caplog.text
        assert "right" not in caplog.text
    finally:
        server.end()


def test_a_broker_that_asks_for_no_tls_is_told_nothing_in_the_clear(tmp_path: Path) -> None:
    """One who stands between could say of any broker that it speaks no TLS."""
    secret, heard = tmp_path / "secret", []
    secret.write_text("monitor:very-secret-password")

    async def stripped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "version": "2.10.0", "max_payload": 1 << 20, "auth_required": True}
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        await writer.drain()
        heard.append(await reader.read(1 << 16))
        writer.close()

    async def connect() -> None:
        async with await asyncio.start_server(stripped, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            # Also where only another address asks for it.
            addresses = f"nats://127.0.0.1:{port},tls://127.0.0.1:{port}"
            settings = MonitorSettings(nats=addresses, nats_credentials=str(secret))
            with pytest.raises(BrokerTrouble):
                await Broker(settings, False, "test")._open()

    asyncio.run(connect())
    assert heard
    assert all(said.startswith(b"\x16\x03") for said in heard), "a TLS handshake"
    assert b"secret" not in b"".join(heard)


def test_a_broker_without_jetstream(
    monitor: Callable[..., Running], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = NatsServer(tmp_path, jetstream=False).start()
    try:
        running = monitor(nats=server.url)
        until(lambda: failures(running, "no_jetstream") > 0, lambda: caplog.text)
        assert "the broker has no JetStream for us; start it with -js" in caplog.text
    finally:
        server.end()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"retention": api.RetentionPolicy.WORK_QUEUE}, "has the retention"),
        ({"deny_delete": True}, "deny_delete"),
        ({"max_msgs_per_subject": 1}, "max_msgs_per_subject"),
        ({"subjects": ["other.>"]}, "does not take the subjects STREAM_MONITOR.>"),
    ],
)
def test_a_stream_that_is_not_for_us(
    other: dict[str, object],
    words: str,
    monitor: Callable[..., Running],
    broker: NatsServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def make(context: JetStreamContext) -> None:
        await context.add_stream(api.StreamConfig(**({"name": STREAM, "subjects": [f"{STREAM}.>"]} | other)))

    broker.ask(make)
    running = monitor(nats=broker.url)
    until(lambda: failures(running, "stream") > 0, lambda: caplog.text)
    assert re.search(f"stream {STREAM} .*{re.escape(words)}.*; name another one with --nats-stream", caplog.text)


def test_a_stream_with_other_limits_keeps_them(
    monitor: Callable[..., Running], broker: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def make(context: JetStreamContext) -> None:
        config = api.StreamConfig(name=STREAM, subjects=[f"{STREAM}.>"], max_age=3600, max_bytes=1 << 30)
        await context.add_stream(config)

    broker.ask(make)
    running = monitor(nats=broker.url)
    until(lambda: running.metric("stream_monitor_nats_up") == 1, lambda: caplog.text)
    assert f"stream {STREAM} keeps its own limits: max_age 3600" in caplog.text


def test_the_page_of_metrics_tells_what_a_process_shows(fleet: Callable[..., FleetProcess]) -> None:
    text = httpx.get(f"http://{fleet('one').http}/metrics", trust_env=False, timeout=30).text
    told = {name: kind for name, kind in documented_metrics().items() if name.startswith("stream_monitor_fleet_")}
    # Without TLS no certificate expires.
    expiry = "stream_monitor_fleet_tls_expiry_timestamp_seconds"
    assert shown_metrics(text, without_samples=[expiry]) == told | {expiry: ("gauge", set())}
