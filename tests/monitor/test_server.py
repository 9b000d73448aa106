"""Listening, health, HTTP, start and stop."""

import asyncio
import ctypes
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from stream_monitor.config import MonitorSettings
from stream_monitor.monitor.http import HttpServer
from stream_monitor.monitor.listen import ListenError, prepare_unix
from stream_monitor.monitor.metric_table import TABLE
from stream_monitor.monitor.run import GRPC_LOG, GoneWhileWrittenTo
from stream_monitor.monitor.server import SERVICES, MonitorServer
from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc
from tests.monitor.conftest import Running, Stream
from tests.monitor.process import free_port
from tests.monitor.synthetic import Engine

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def health(monitor: Running, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(monitor.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)


def test_health_by_service_and_reflection(monitor: Running) -> None:
    assert [health(monitor, name) for name in ("", *SERVICES)] == [SERVING] * 3
    assert SERVICES == ("stream_monitor.v1alpha1.IngestService", "stream_monitor.v1alpha1.MonitorService")
    stub = reflection_pb2_grpc.ServerReflectionStub(monitor.channel)
    (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert set(SERVICES) < {service.name for service in answer.list_services_response.service}


def test_http_speaks_both_formats(monitor: Running) -> None:
    monitor.publish(Engine().request("r", [4] * 20))
    assert monitor.http("/healthz").status_code == monitor.http("/readyz").status_code == 200
    plain = monitor.http("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    open_metrics = monitor.http("/metrics", "application/openmetrics-text; version=1.0.0")
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in text_string_to_metric_families(open_metrics.text)}
    assert families["stream_monitor_rows"].type == "counter"
    labels = {label for family in families.values() for sample in family.samples for label in sample.labels}
    assert labels <= {label for definition in TABLE for label in definition.labels} | {"le"}
    assert all(name.startswith(("stream_monitor_", "process_")) for name in families)


def test_stop_announces_before_it_ends_streams(run: Callable[..., Running]) -> None:
    monitor = run()
    stub = health_pb2_grpc.HealthStub(monitor.channel)
    watched = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICES[1]))
    assert next(watched).status == SERVING
    events = monitor.api.Subscribe(monitor_pb2.SubscribeRequest())
    next(events)
    publisher, rank = Stream(monitor), Engine()
    publisher.send(rank.summary())
    order: list[str] = []
    graceful, stop_ingest = monitor.server.front.health.enter_graceful_shutdown, monitor.server.ingest.stop

    async def announced() -> None:
        order.append("not_serving")
        await graceful()

    def ended() -> None:
        order.append("streams")
        stop_ingest()

    monitor.server.front.health.enter_graceful_shutdown = announced  # type: ignore[method-assign]
    monitor.server.ingest.stop = ended  # type: ignore[method-assign]
    started = time.monotonic()
    monitor.call(monitor.server.stop())
    monitor.stopped = True
    assert order == ["not_serving", "streams"]
    assert time.monotonic() - started < 3
    assert next(watched).status == NOT_SERVING
    for stream in (lambda: next(events), lambda: publisher.send(rank.summary())):
        with pytest.raises(grpc.RpcError) as error:
            stream()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not os.path.exists(monitor.server.ingest_address.removeprefix("unix:"))


def test_the_socket_is_for_user_and_group_only(monitor: Running, tmp_path: Path) -> None:
    assert (tmp_path / "ingest.sock").stat().st_mode & 0o777 == 0o660


def test_a_missing_folder_is_made_for_user_and_group(tmp_path: Path) -> None:
    prepare_unix("ingest", f"unix:{tmp_path / 'new' / 'ingest.sock'}")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o770


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(run: Callable[..., Running], tmp_path: Path) -> None:
    path = tmp_path / "ingest.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    monitor = run()
    monitor.publish([Engine().summary()])
    with pytest.raises(ListenError, match="in use by another process"):
        run()
    monitor.publish([Engine().summary()])


def test_folders_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    real, link, shared = tmp_path / "real", tmp_path / "link", tmp_path / "shared"
    real.mkdir()
    link.symlink_to(real)
    shared.mkdir()
    shared.chmod(0o777)
    for folder, why in (
        (link, "symbolic link"),
        (shared, "open to every user"),
        (Path("/proc/1"), "in use|cannot|belongs|open"),
        (Path("/proc/none"), "^ingest: cannot make folder /proc/none: "),
    ):
        with pytest.raises(ListenError, match=why):
            prepare_unix("ingest", f"unix:{folder / 'x.sock'}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ListenError, match="not a socket"):
        prepare_unix("ingest", f"unix:{tmp_path / 'file'}")


@pytest.mark.parametrize("key", ["grpc", "http"])
def test_a_port_in_use_is_one_clear_line(run: Callable[..., Running], key: str, tmp_path: Path) -> None:
    first = run()
    address = getattr(first.server, f"{key}_address")
    with pytest.raises(ListenError, match=f"^{key}: cannot listen on {address}"):
        run(**{key: address, "ingest": f"unix:{tmp_path / 'other.sock'}"})


def refused_start(**addresses: str) -> str:
    """What `serve` says of itself when it ends at once with status 2; addresses that are not given are free."""
    settings = {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0", "store": "", **addresses}
    done = subprocess.run(
        [sys.executable, "-m", "stream_monitor", "serve", *(f"--{name}={value}" for name, value in settings.items())],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 2
    return done.stderr


def test_grpc_says_nothing_of_its_own_of_a_port_in_use(run: Callable[..., Running], tmp_path: Path) -> None:
    address = run().server.grpc_address
    said = refused_start(grpc=address, ingest=f"unix:{tmp_path / 'other.sock'}")
    assert said == f"stream-monitor: grpc: cannot listen on {address}: Address already in use\n"


@pytest.mark.parametrize(("first", "second"), [("http", "grpc"), ("http", "metrics")])
def test_one_port_for_two_things_is_one_clear_line(first: str, second: str, tmp_path: Path) -> None:
    """Neither listened yet when the other was bound; the process then waited for ever to be up."""
    address = f"127.0.0.1:{free_port()}"
    said = refused_start(ingest=f"unix:{tmp_path / 'ingest.sock'}", **{first: address, second: address})
    assert said == f"stream-monitor: {second}: cannot listen on {address}: Address already in use\n"


def test_an_http_server_that_ends_at_once_is_told(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    async def ends(_: HttpServer) -> None:
        raise OSError("no more files")

    monkeypatch.setattr(HttpServer, "serve", ends)
    with pytest.raises(ListenError, match=r"^http: cannot be served: no more files"):
        run()


def test_a_client_that_leaves_while_it_is_written_to_is_no_fault(
    monitor: Running, caplog: pytest.LogCaptureFixture
) -> None:
    def leave() -> None:
        """Takes nothing in until a write waits for room, and goes away then."""
        channel = grpc.insecure_channel(
            monitor.server.grpc_address, [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
        )
        subscriber = monitor_pb2_grpc.MonitorServiceStub(channel).Subscribe(monitor_pb2.SubscribeRequest())
        next(subscriber)
        event = monitor_pb2.Event(kind=monitor_pb2.EVENT_KIND_ANCHOR_SHIFT, summary="x" * 100_000)
        for _ in range(40):
            monitor.loop.call_soon_threadsafe(monitor.server.log.publish, event)
        time.sleep(0.3)

        def at_once() -> None:
            channel.close()
            time.sleep(0.2)

        monitor.loop.call_soon_threadsafe(at_once)
        end = time.monotonic() + 10
        while monitor.metric("stream_monitor_subscribers"):
            assert time.monotonic() < end

    # Which end of the call is heard of first is chance, mostly the same.
    for _ in range(10):
        leave()
        if caplog.text:
            break
    if not caplog.text:
        pytest.skip("every time the end of the call was heard of first; the filter by itself is tested below")
    assert "ExecuteBatchError" in caplog.text
    caplog.clear()
    quiet = GoneWhileWrittenTo()
    logging.getLogger(GRPC_LOG).addFilter(quiet)
    try:
        for _ in range(3):
            leave()
        logging.getLogger(GRPC_LOG).error("anything else")
    finally:
        logging.getLogger(GRPC_LOG).removeFilter(quiet)
    assert caplog.messages == ["anything else"]


def test_the_log_leaves_out_what_grpc_says_of_clients_that_left_and_nothing_else() -> None:
    def said(text: str, *arguments: object) -> logging.LogRecord:
        return logging.LogRecord(GRPC_LOG, logging.ERROR, "", 0, text, arguments, None)

    # As grpc.aio 1.85 words it.
    assert not GoneWhileWrittenTo().filter(said("ExecuteBatchError raised in core by servicer method [%s]", "/a/B"))
    assert GoneWhileWrittenTo().filter(said("Unexpected [%s] raised by servicer method [%s]", "KeyError", "/a/B"))


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"])
def test_nothing_listens_beyond_loopback_unless_told(address: str) -> None:
    for key in ("ingest", "grpc", "http"):
        with pytest.raises(ListenError, match=f"^{key}: .*--insecure"):
            asyncio.run(MonitorServer(MonitorSettings(**{key: address}), "test").start())


def test_insecure_listens_everywhere(run: Callable[..., Running]) -> None:
    monitor = run(http="0.0.0.0:0", insecure=True)
    port = monitor.server.http_address.rpartition(":")[2]
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200


def test_one_address_may_serve_both(run: Callable[..., Running], tmp_path: Path) -> None:
    monitor = run(grpc=f"unix:{tmp_path / 'ingest.sock'}")
    monitor.publish(Engine().request("r", [4]))
    assert len(monitor.api.ListRequests(monitor_pb2.ListRequestsRequest()).requests) == 1


def test_the_command_is_ready_in_two_seconds_and_stops_on_sigterm(tmp_path: Path) -> None:
    http = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "stream_monitor", "serve", "--http", http, "--grpc", "127.0.0.1:0"]
    times = []
    # The better of two, as the first may find a cold page cache. Where other work takes the cores, what counts is the
    # time the monitor had one.
    for _ in range(2):
        begun = time.monotonic()
        process = subprocess.Popen(
            [*command, "--ingest", f"unix:{tmp_path / 's' / 'i.sock'}"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: ingest unix:")
        took = time.monotonic() - begun
        usage = psutil.Process(process.pid).cpu_times()
        busy = os.getloadavg()[0] > (os.cpu_count() or 1)
        times.append(usage.user + usage.system if busy else took)
        assert httpx.get(f"http://{http}/readyz", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    assert min(times) < 2


@pytest.mark.parametrize("command", ["serve", "fleet"])
def test_where_no_memory_may_be_made_executable_one_line_says_so(command: str) -> None:
    forbid = "import ctypes, sys; sys.exit(ctypes.CDLL(None).prctl(65, 1, 0, 0, 0))"  # PR_SET_MDWE
    if subprocess.run([sys.executable, "-c", forbid]).returncode:
        pytest.skip("this kernel cannot forbid it")
    done = subprocess.run(
        [sys.executable, "-m", "stream_monitor", command, "--nats", "nats://127.0.0.1:1"],
        preexec_fn=lambda: ctypes.CDLL(None).prctl(65, 1, 0, 0, 0),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"stream-monitor: .* make memory executable.*MemoryDenyWriteExecute=no\)\n", done.stderr)


def test_the_monitor_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, pkgutil, importlib, stream_monitor.monitor as m, stream_monitor.anchors as a\n"
        "for p in (m, a):\n"
        "    for i in pkgutil.iter_modules(p.__path__): importlib.import_module(p.__name__ + '.' + i.name)\n"
        "print([n for n in ('torch', 'vllm', 'triton', 'transformers', 'river') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
