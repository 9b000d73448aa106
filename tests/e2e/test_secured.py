"""A real engine that publishes over TLS with a token, and whose requests belong to whom the gateway says."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from stream_monitor.client import Monitor, MonitorError, Target
from tests.e2e.serving import Product, eventually, free_port, total
from tests.e2e.tiny_models import make_model
from tests.security.guarded import SCRAPER, Files, principal, token_of

pytestmark = [pytest.mark.engine, pytest.mark.long]

FLAGS = "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 4 --block-size 32 --served-model-name tiny"
ACCESS = (
    SCRAPER + principal("engine", publish="*") + principal("acme", subscribe="acme") + principal("all", subscribe="*")
)


class Secured(Product):
    """Monitor and engine speak TLS over TCP; metrics are on an address of their own, in the clear."""

    def __init__(self, folder: Path) -> None:
        make_model(folder / "model", "qwen3")
        ca = trustme.CA()
        files = Files(folder / "tls")
        files.put(ca.issue_cert("localhost"))
        self.ca = folder / "ca.crt"
        self.ca.write_bytes(ca.cert_pem.bytes())
        (folder / "access.toml").write_text(ACCESS)
        self.token("engine", folder)
        self._ingest, metrics = f"localhost:{free_port()}", f"127.0.0.1:{free_port()}"
        super().__init__(
            folder / "model",
            folder,
            FLAGS.split(),
            **files.settings(),
            access=folder / "access.toml",
            metrics=metrics,
            metrics_insecure=True,
            target=self._ingest,
            target_ca=self.ca,
            target_token_file=folder / "engine.token",
            tenant_argument="whose",
            stride=1,
        )

    def start_monitor(self) -> None:
        http = self.monitor_http.removeprefix("http://")
        grpc = self.grpc_address.replace("127.0.0.1", "localhost")
        self._start("monitor", "serve", "--ingest", self._ingest, "--grpc", grpc, "--http", http)
        self.grpc_address = grpc
        self.monitor_http = f"http://{self._environment['STREAM_MONITOR_METRICS']}"
        self.wait_for(f"{self.monitor_http}/readyz", "monitor")

    def token(self, name: str, folder: Path) -> str:
        """The file of a principal's token."""
        path = folder / f"{name}.token"
        path.write_text(token_of(name))
        return str(path)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    running = Secured(tmp_path_factory.mktemp("secured"))
    yield running
    running.stop()


def ask(product: Secured, name: str, **arguments: str) -> None:
    """One request, as it comes out of the gateway."""
    body = {"model": "tiny", "prompt": "1 2 3 4", "max_tokens": 24, "ignore_eos": True, "vllm_xargs": arguments}
    answer = httpx.post(f"{product.engine_http}/v1/completions", json=body, headers={"x-request-id": name}, timeout=120)
    assert answer.status_code == 200, answer.text


def test_whose_a_request_is_goes_from_the_gateway_to_the_subscriber(product: Secured, tmp_path: Path) -> None:
    ask(product, "of-acme", whose="acme")
    ask(product, "of-beta", whose="beta")
    # What a client says does not count, unless the gateway let it through under the name that the operator chose.
    ask(product, "claimed", stream_monitor_tenant="acme")
    ask(product, "malformed", whose="no such name!")

    def seen(name: str) -> dict[str, str]:
        with Monitor(Target(product.grpc_address, ca=str(product.ca), token_file=product.token(name, tmp_path))) as it:
            return {info.external_id.removeprefix("cmpl-"): info.tenant for info in it.list_requests()}

    assert eventually(lambda: len(seen("all")) == 4, 30)
    assert seen("all") == {"of-acme": "acme", "of-beta": "beta", "claimed": "", "malformed": ""}
    assert seen("acme") == {"of-acme": "acme"}
    with pytest.raises(MonitorError, match="the token is nobody's who has access"):
        seen("stranger")

    def refused() -> dict[str, float]:
        name, reasons = "stream_monitor_request_arguments_refused_total", ("not_allowed", "missing", "malformed")
        found = {
            each: total(product.monitor_http, name, argument="stream_monitor_tenant", reason=each) for each in reasons
        }
        return found | {"other": total(product.monitor_http, name, argument="other")}

    once = {"not_allowed": 1, "missing": 1, "malformed": 1, "other": 0}
    assert eventually(lambda: refused() == once, 30), refused()
    assert total(product.monitor_http, "stream_monitor_rows_total", outcome="captured", phase="token") > 0
    for name in ("engine", "monitor"):
        assert token_of("engine") not in product.log(name)
