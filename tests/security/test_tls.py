"""TLS and mutual TLS over gRPC and HTTP: who is refused, that others are served, and certificates that are replaced."""

import logging
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from cryptography import x509

from stream_monitor.client import Monitor, MonitorError
from stream_monitor.monitor.access.certificates import Certificates, Files, TlsError
from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc
from tests.monitor.conftest import TIMEOUT
from tests.monitor.synthetic import Engine
from tests.monitor.test_service import SHIFTING
from tests.security.guarded import SCRAPER, Guarded, code_of, expired, principal, wait_until
from tests.security.guarded import Files as Written

EXPIRY = "stream_monitor_tls_expiry_timestamp_seconds"
RELOADS = "stream_monitor_access_reloads_total"


def listed(monitor: Guarded, **how: object) -> grpc.StatusCode:
    with monitor.open(**how) as channel:  # type: ignore[arg-type]
        stub = monitor_pb2_grpc.MonitorServiceStub(channel)
        return code_of(lambda: stub.ListRequests(monitor_pb2.ListRequestsRequest(), timeout=TIMEOUT))


def turned_away(monitor: Guarded, client: trustme.LeafCert | None) -> None:
    """The connection gets no handshake. Under TLS 1.3 the client's part ends before the server looks at its
    certificate, and rarely gRPC's client then waits for its deadline: that is no answer, and it is asked again, from a
    process of its own, as it has waited four times in a row in the server's."""
    code = listed(monitor, client=client)
    for _ in range(3):
        if code is not grpc.StatusCode.DEADLINE_EXCEEDED:
            break
        with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
            code = elsewhere.submit(listed_at, monitor.server.grpc_address, *monitor.shown(client)).result()
    assert code is grpc.StatusCode.UNAVAILABLE


def listed_at(address: str, *certificates: bytes) -> grpc.StatusCode:
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(*certificates)) as channel:
        stub = monitor_pb2_grpc.MonitorServiceStub(channel)
        return code_of(lambda: stub.ListRequests(monitor_pb2.ListRequestsRequest(), timeout=TIMEOUT))


def serial(address: str, alpn: str) -> int:
    """Of the certificate that a new connection is shown, looked at by a client that is not ours."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([alpn])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), TIMEOUT) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        raw = wrapped.getpeercert(binary_form=True)
        assert raw is not None
        return x509.load_der_x509_certificate(raw).serial_number


def test_both_ports_speak_tls_and_tell_when_it_ends(start: Callable[..., Guarded], files: Written) -> None:
    monitor = start(files=files)
    assert listed(monitor) is grpc.StatusCode.OK
    assert monitor.get("/healthz").text == "ok\n"
    leaf = x509.load_pem_x509_certificates(files.certificate.read_bytes())
    ends = min(one.not_valid_after_utc.timestamp() for one in leaf)
    assert monitor.metric(EXPIRY, file="certificate") == ends


def test_plaintext_to_a_tls_port_gets_nothing_and_others_are_served(
    start: Callable[..., Guarded], files: Written
) -> None:
    monitor = start(files=files)
    events = monitor.monitor().Subscribe(monitor_pb2.SubscribeRequest())
    next(events)
    with grpc.insecure_channel(monitor.server.grpc_address, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = monitor_pb2_grpc.MonitorServiceStub(channel)
        refused = code_of(lambda: stub.ListRequests(monitor_pb2.ListRequestsRequest(), timeout=TIMEOUT))
        assert refused is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{monitor.server.http_address}/api/requests", trust_env=False, timeout=TIMEOUT)
    wait_until(lambda: monitor.refused("http", "handshake") == 1)
    monitor.tell(Engine().request("a", SHIFTING))
    assert next(events).event.key.request_id == "a"
    assert monitor.get("/api/requests").json()["requests"]


def test_tls_to_a_plaintext_port_is_said_in_one_line(start: Callable[..., Guarded], ca: trustme.CA) -> None:
    monitor = start()
    credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes())
    with (
        Monitor(monitor.server.grpc_address, credentials=credentials) as client,
        pytest.raises(MonitorError, match=r"no TLS with localhost:\d+: .*handshake") as raised,
    ):
        list(client.list_requests())
    assert "\n" not in str(raised.value)
    assert listed(monitor) is grpc.StatusCode.OK


@pytest.mark.parametrize("shown", ["none", "of another CA", "expired", "good"])
def test_mutual_tls_wants_a_certificate_that_holds(
    start: Callable[..., Guarded],
    files: Written,
    ca: trustme.CA,
    other_ca: trustme.CA,
    shown: str,
) -> None:
    client = {
        "none": None,
        "of another CA": other_ca.issue_cert(common_name="engine"),
        "expired": expired(ca, "engine@example.org"),
        "good": ca.issue_cert("engine@example.org"),
    }[shown]
    monitor = start(files=files, mutual=True)
    if shown == "good":
        assert listed(monitor, client=client) is grpc.StatusCode.OK
    else:
        turned_away(monitor, client)
    assert listed(monitor, client=ca.issue_cert("another@example.org")) is grpc.StatusCode.OK
    assert monitor.metric(EXPIRY, file="client_ca") > 0


def test_http_takes_a_certificate_in_the_place_of_a_token(
    start: Callable[..., Guarded], files: Written, ca: trustme.CA, other_ca: trustme.CA, tmp_path: Path
) -> None:
    monitor = start(files=files, mutual=True)
    for name, leaf in (
        ("good", ca.issue_cert("me@example.org")),
        ("bad", other_ca.issue_cert("me@example.org")),
        ("old", expired(ca, "me@example.org")),
    ):
        Written(tmp_path / name).put(leaf)
    # Those who restart it show nothing, and are told no more than that it lives.
    assert monitor.get("/healthz").status_code == 200
    assert monitor.get("/api/requests").status_code == 401
    assert monitor.get("/metrics").status_code == 401
    assert monitor.refused("http", "no_credential") == 2
    assert monitor.get("/api/requests", client=tmp_path / "good").status_code == 200
    for number, name in enumerate(("bad", "old"), 1):
        with pytest.raises(httpx.HTTPError):
            monitor.get("/api/requests", client=tmp_path / name)
        wait_until(lambda number=number: monitor.refused("http", "handshake") == number)  # type: ignore[misc]
    assert monitor.get("/api/requests", client=tmp_path / "good").status_code == 200


def test_a_certificate_has_the_rights_of_its_principal(
    start: Callable[..., Guarded], files: Written, ca: trustme.CA
) -> None:
    spiffe = "spiffe://cluster.local/ns/serving/sa/console"
    access = SCRAPER + principal("console", f'certificate = "{spiffe}"', subscribe="*")
    access += principal("named", 'certificate = "CN=by name"', subscribe="*")
    monitor = start(access, files, mutual=True)
    assert listed(monitor, client=ca.issue_cert("another@example.org", common_name="by name")) is grpc.StatusCode.OK
    # Known to be trusted, and nobody's.
    assert listed(monitor, client=ca.issue_cert("x@example.org")) is grpc.StatusCode.UNAUTHENTICATED
    assert monitor.refused("grpc", "unknown_certificate") == 1


def test_a_certificate_is_replaced_while_a_stream_runs(
    start: Callable[..., Guarded], files: Written, ca: trustme.CA
) -> None:
    monitor = start(files=files)
    events = monitor.monitor().Subscribe(monitor_pb2.SubscribeRequest())
    next(events)
    ports = ((monitor.server.grpc_address, "h2"), (monitor.server.http_address, "http/1.1"))
    before = {serial(*port) for port in ports}
    assert len(before) == 1
    files.put(ca.issue_cert("localhost"))
    wait_until(lambda: monitor.metric(RELOADS, file="certificate", outcome="done") == 1)
    after = {serial(*port) for port in ports}
    assert len(after) == 1
    assert after != before
    monitor.tell(Engine().request("a", SHIFTING))
    assert next(events).event.key.request_id == "a"
    assert listed(monitor) is grpc.StatusCode.OK


@pytest.mark.parametrize("wrong", ["no PEM", "another's key", "expired"])
def test_what_cannot_be_used_leaves_the_certificate_before_in_place(
    start: Callable[..., Guarded], files: Written, ca: trustme.CA, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = start(files=files)
    before = serial(monitor.server.grpc_address, "h2")
    if wrong == "no PEM":
        files.certificate.write_text("nothing of the kind\n")
    elif wrong == "another's key":
        files.key.write_bytes(ca.issue_cert("localhost").private_key_pem.bytes())
    else:
        files.put(expired(ca, "localhost"))
    wait_until(lambda: monitor.metric(RELOADS, file="certificate", outcome="failed") == 1)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    culprit = files.key if wrong == "another's key" else files.certificate
    assert line.startswith(f"tls: {culprit} ")
    assert line.endswith("what was read before stays in use")
    assert serial(monitor.server.grpc_address, "h2") == serial(monitor.server.http_address, "http/1.1") == before
    assert listed(monitor) is grpc.StatusCode.OK
    # The next good one is taken.
    files.put(ca.issue_cert("localhost"))
    wait_until(lambda: monitor.metric(RELOADS, file="certificate", outcome="done") == 1)
    assert serial(monitor.server.grpc_address, "h2") != before


def test_a_client_ca_that_is_taken_away_lets_nobody_in_any_more(
    start: Callable[..., Guarded], files: Written, ca: trustme.CA, other_ca: trustme.CA, tmp_path: Path
) -> None:
    monitor = start(files=files, mutual=True)
    leaf = ca.issue_cert("me@example.org")
    Written(tmp_path / "me").put(leaf)
    assert monitor.get("/api/requests", client=tmp_path / "me").status_code == 200
    files.put(ca.issue_cert("localhost"), client_ca=other_ca)
    wait_until(lambda: monitor.metric(RELOADS, file="certificate", outcome="done") == 1)
    turned_away(monitor, leaf)
    with pytest.raises(httpx.HTTPError):
        monitor.get("/api/requests", client=tmp_path / "me")
    assert listed(monitor, client=other_ca.issue_cert("me@example.org")) is grpc.StatusCode.OK


def test_each_fault_of_the_files_has_its_line_at_start(files: Written, ca: trustme.CA, tmp_path: Path) -> None:
    def error(certificate: Path, key: Path, client_ca: Path | None = None) -> str:
        with pytest.raises(TlsError) as raised:
            Certificates(Files(certificate, key, client_ca))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    good, key, nowhere, junk = files.certificate, files.key, tmp_path / "nowhere", tmp_path / "junk"
    junk.write_text("junk")
    other, old = Written(tmp_path / "other"), Written(tmp_path / "old")
    other.put(ca.issue_cert("localhost"))
    old.put(expired(ca, "localhost"))
    assert error(nowhere, key) == f"cannot read {nowhere}: No such file or directory"
    assert error(good, nowhere) == f"cannot read {nowhere}: No such file or directory"
    assert error(junk, key) == f"{junk} holds no PEM certificate"
    assert error(good, junk) == f"{junk} holds no PEM key without a pass phrase"
    assert error(good, other.key) == f"{other.key} is not the key of {good}"
    assert error(old.certificate, old.key).startswith(f"{old.certificate} expired on 20")
    assert error(good, key, junk) == f"{junk} holds no PEM certificate"
