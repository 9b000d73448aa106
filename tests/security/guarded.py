"""A monitor that asks who is there: certificates, an access file, and clients of all kinds."""

import datetime
import json
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import httpx
import trustme
from prometheus_client.parser import text_string_to_metric_families

from stream_monitor.config import MonitorSettings
from stream_monitor.monitor import front
from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc, monitor_pb2_grpc, summary_pb2
from tests.monitor.conftest import TIMEOUT, Running

REFUSED = "stream_monitor_access_refused_total"
FRESH = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
]


def token_of(name: str) -> str:
    """Each principal's token in these tests."""
    return f"{name}-token-0123456789abcdef"


def principal(name: str, shown: str = "", **rights: str | Sequence[str]) -> str:
    """One entry of an access file; `shown` is how it is recognised, its token if that is empty."""
    lists = {right: [tenants] if isinstance(tenants, str) else list(tenants) for right, tenants in rights.items()}
    pairs = ", ".join(f"{right} = {json.dumps(tenants)}" for right, tenants in lists.items())
    return (
        f'[[principal]]\nname = "{name}"\n{shown or f"token = {json.dumps(token_of(name))}"}\nrights = {{ {pairs} }}\n'
    )


SCRAPER = principal("scraper", "anyone = true", metrics="*")
EVERYTHING = {"publish": "*", "subscribe": "*", "read_text": "*", "delete": "*", "metrics": "*"}


class Files:
    """Certificate, key and client CA in a folder, as a monitor reads them; each `put` replaces them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.certificate, self.key, self.client_ca = (folder / name for name in ("tls.crt", "tls.key", "clients.crt"))

    def put(self, leaf: trustme.LeafCert, client_ca: trustme.CA | None = None) -> None:
        for path, content in (
            (self.certificate, b"".join(blob.bytes() for blob in leaf.cert_chain_pems)),
            (self.key, leaf.private_key_pem.bytes()),
            *(((self.client_ca, client_ca.cert_pem.bytes()),) if client_ca else ()),
        ):
            fresh = path.with_suffix(".new")
            fresh.write_bytes(content)
            fresh.replace(path)

    def settings(self, mutual: bool = False) -> dict[str, str]:
        found = {"tls_certificate": str(self.certificate), "tls_key": str(self.key)}
        return found | ({"tls_client_ca": str(self.client_ca)} if mutual else {})


def expired(ca: trustme.CA, *names: str) -> trustme.LeafCert:
    """A certificate of yesterday."""
    return ca.issue_cert(*names, not_after=datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1))


class Guarded(Running):
    """A monitor whose clients are made by the tests; /metrics is on an address of its own, in the clear."""

    def __init__(self, settings: MonitorSettings, ca: trustme.CA | None) -> None:
        super().__init__(settings)
        self.ca = ca

    def open(
        self, client: trustme.LeafCert | None = None, ca: trustme.CA | None = None, address: str = ""
    ) -> grpc.Channel:
        """A channel to the gRPC address, or another one, over TLS if the monitor speaks it (not over Unix sockets)."""
        address = address or self.server.grpc_address
        trusted = ca or self.ca
        if trusted is None or address.startswith("unix:"):
            return grpc.insecure_channel(address, FRESH)
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(*self.shown(client, trusted)), FRESH)

    def shown(self, client: trustme.LeafCert | None, ca: trustme.CA | None = None) -> tuple[bytes, ...]:
        """The PEM files of a client's credentials: who it trusts, and if it has a certificate, its key and that."""
        trusted = ca or self.ca
        assert trusted is not None
        own = (client.private_key_pem.bytes(), b"".join(b.bytes() for b in client.cert_chain_pems)) if client else ()
        return trusted.cert_pem.bytes(), *own

    def monitor(self, **how: Any) -> monitor_pb2_grpc.MonitorServiceStub:
        return monitor_pb2_grpc.MonitorServiceStub(self.open(**how))

    def tell(
        self, summaries: Sequence[summary_pb2.StepSummary], name: str = "", **how: Any
    ) -> list[ingest_pb2.PublishResponse]:
        """Publish on behalf of a principal."""
        how.setdefault("address", self.server.ingest_address)
        with self.open(**how) as channel:
            stub = ingest_pb2_grpc.IngestServiceStub(channel)
            requests = (ingest_pb2.PublishRequest(summary=summary) for summary in summaries)
            return list(stub.Publish(requests, timeout=TIMEOUT, metadata=as_(name)))

    def get(self, path: str, name: str = "", **more: Any) -> httpx.Response:
        """Over HTTP, with the token of a principal."""
        headers = dict(as_(name)) | more.pop("headers", {})
        with self.browser(**more) as client:
            return client.get(path, headers=headers)

    def browser(self, client: Path | None = None, ca: trustme.CA | None = None) -> httpx.Client:
        """An HTTP client with cookies; `client` is the folder of its certificate."""
        trusted = ca or self.ca
        context = ssl.create_default_context()
        if trusted is not None:
            trusted.configure_trust(context)
        if client is not None:
            context.load_cert_chain(client / "tls.crt", client / "tls.key")
        scheme = "https" if self.server.front.access.certificates else "http"
        address = self.server.http_address.replace("127.0.0.1", "localhost")
        return httpx.Client(base_url=f"{scheme}://{address}", trust_env=False, timeout=TIMEOUT, verify=context)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples that carry these labels."""
        response = httpx.get(f"http://{self.server.metrics_address}/metrics", trust_env=False, timeout=TIMEOUT)
        text = response.raise_for_status().text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def refused(self, where: str, reason: str) -> float:
        return self.metric(REFUSED, where=where, reason=reason)


def as_(name: str) -> tuple[tuple[str, str], ...]:
    """Metadata, or headers, of a call on behalf of a principal."""
    return (("authorization", f"Bearer {token_of(name)}"),) if name else ()


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    """How a call ends."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code()  # type: ignore[no-any-return, attr-defined]
    return grpc.StatusCode.OK


def wait_until(condition: Callable[[], object], what: str = "", seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what or "it did not come true"
        time.sleep(0.02)


def guard(folder: Path, ca: trustme.CA | None) -> Iterator[Callable[..., Guarded]]:
    """Starts monitors; `access` is the text of the access file, `files` those of TLS. They look for replaced files four
    times as often as others."""
    running: list[Guarded] = []

    def start(access: str | None = None, files: Files | None = None, mutual: bool = False, **settings: Any) -> Guarded:
        defaults: dict[str, Any] = {
            "ingest": f"unix:{folder / 'ingest.sock'}",
            "grpc": "localhost:0",
            "http": "127.0.0.1:0",
            "metrics": "127.0.0.1:0",
            "metrics_insecure": True,
            "store": "",
            "shutdown_grace_seconds": 0.2,
        }
        if access is not None:
            (folder / "access.toml").write_text(access)
            (folder / "access.toml").chmod(0o600)
            defaults["access"] = str(folder / "access.toml")
        if files is not None:
            defaults |= files.settings(mutual)
        running.append(Guarded(MonitorSettings(**(defaults | settings)), ca if files is not None else None))
        return running[-1]

    with patch.object(front, "REFRESH_SECONDS", front.REFRESH_SECONDS / 4):
        yield start
        for each in running:
            each.stop()
