"""What `deploy/` has for a fleet: the compose file, the alerts, the manifests."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import trustme
import yaml

from stream_monitor import __version__
from stream_monitor.config import FleetSettings, MonitorSettings
from stream_monitor.monitor.fleet.metric_table import FLEET_TABLE
from stream_monitor.monitor.metric_table import TABLE
from tests.deploy.installed import ROOT
from tests.deploy.promql import metrics_in
from tests.monitor.conftest import Running, starter
from tests.monitor.fleet.broker import PROGRAM
from tests.monitor.fleet.processes import until
from tests.monitor.process import free_port

COMPOSE = ROOT / "deploy" / "compose"
ALERTS = ROOT / "deploy" / "prometheus" / "fleet"
PREFIX = "STREAM_MONITOR_"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """As Docker Compose reads them."""
    program = Path(sys.executable).with_name("docker-compose")
    files = [part for name in ("compose.yaml", "compose.fleet.yaml") for part in ("-f", str(COMPOSE / name))]
    done = subprocess.run([program, *files, "config", "--format=json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def settings(service: dict[str, Any]) -> dict[str, str]:
    found = service["environment"].items()
    return {key.removeprefix(PREFIX).lower(): value for key, value in found if key.startswith(PREFIX)}


def test_monitor_and_processes_meet_at_the_broker(services: dict[str, Any]) -> None:
    processes = {name: each for name, each in services.items() if each.get("command") == ["fleet"]}
    assert len(processes) == 2
    monitor = MonitorSettings(**settings(services["monitor"]))  # type: ignore[arg-type]
    held = [FleetSettings(**settings(each)) for each in processes.values()]  # type: ignore[arg-type]
    for each in (monitor, *held):
        assert each.nats == "nats://nats:4222"
        # The broker is another container, in the clear.
        assert each.insecure
    assert len({each.fleet_name for each in held}) == 2
    for process, each in zip(processes.values(), held, strict=True):
        assert process["image"] == services["monitor"]["image"] == f"stream-monitor:{__version__}"
        (volume,) = process["volumes"]
        assert each.fleet_store.startswith(f"{volume['target']}/")
    assert len({process["volumes"][0]["source"] for process in processes.values()}) == 2
    assert "-js" in services["nats"]["command"]


def test_nothing_is_published_beyond_loopback_and_all_is_confined(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert all(port["host_ip"] == "127.0.0.1" for port in ports)
    assert len({port["published"] for port in ports}) == len(ports) == 10
    for name in ("nats", "fleet-1", "fleet-2"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
    assert re.fullmatch(r"nats:\d+\.\d+\.\d+", services["nats"]["image"])


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed; make tools does it")
def test_prometheus_scrapes_the_processes_and_loads_their_alerts(services: dict[str, Any], tmp_path: Path) -> None:
    mounted = {each["target"]: Path(each["source"]) for each in services["prometheus"]["volumes"] if "bind" in each}
    for target, source in mounted.items():
        staged = tmp_path / Path(target).relative_to("/etc/prometheus")
        staged.parent.mkdir(exist_ok=True)
        shutil.copytree(source, staged) if source.is_dir() else shutil.copy(source, staged)
    done = subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fleet/alerts.yaml" in done.stdout
    jobs = yaml.safe_load((tmp_path / "prometheus.yaml").read_text())["scrape_configs"]
    (named,) = (file for job in jobs for each in job.get("file_sd_configs", ()) for file in each["files"])
    (found,) = yaml.safe_load((tmp_path / named).read_text())
    wanted = {
        f"{name}:{settings(each)['metrics'].rpartition(':')[2]}"
        for name, each in services.items()
        if each.get("command") == ["fleet"]
    }
    assert set(found["targets"]) == wanted


def test_grafana_has_the_dashboard_of_a_fleet_beside_the_monitors(services: dict[str, Any]) -> None:
    folder = "/etc/grafana/dashboards/"
    mounted = {each["target"]: Path(each["source"]) for each in services["grafana"]["volumes"]}
    boards = {json.loads(path.read_text())["uid"] for target, path in mounted.items() if target.startswith(folder)}
    assert boards == {"stream-monitor", "stream-monitor-fleet"}


def test_the_image_has_what_a_fleet_needs() -> None:
    assert "[fleet,page,text]" in (ROOT / "deploy" / "docker" / "monitor.Dockerfile").read_text()


def test_the_alerts_fire_and_are_on_the_page() -> None:
    done = subprocess.run(["promtool", "test", "rules", ALERTS / "tests.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (group,) = yaml.safe_load((ALERTS / "alerts.yaml").read_text())["groups"]
    page = (ROOT / "docs" / "fleet.md").read_text()
    tests = (ALERTS / "tests.yaml").read_text()
    known = {definition.name for definition in (*TABLE, *FLEET_TABLE)}
    for rule in group["rules"]:
        assert f"**{rule['alert']}**" in page
        assert rule["annotations"]["runbook_url"] == "docs/fleet.md#alerts"
        assert rule["alert"] in tests
        assert metrics_in(rule["expr"]) <= known
    assert "\n## Alerts\n" in page


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    yield from starter(tmp_path)


needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed; make tools does it")
Resource = dict[str, Any]


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], Resource]:
    """The overlay as `kubectl kustomize` builds it, by kind and name."""
    overlay = ROOT / "deploy" / "kubernetes" / "overlays" / "nats"
    done = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}


def container(manifests: dict[tuple[str, str], Resource], kind: str, name: str, of: str) -> tuple[Resource, Resource]:
    """A container, and the specification of its pod."""
    spec = manifests[kind, name]["spec"]["template"]["spec"]
    (found,) = (each for each in [*spec.get("initContainers", ()), *spec["containers"]] if each["name"] == of)
    return found, spec


def environment(manifests: dict[tuple[str, str], Resource], found: Resource) -> dict[str, str]:
    maps = [each["configMapRef"]["name"] for each in found.get("envFrom", ())]
    values: dict[str, str] = {}
    for name in maps:
        values |= manifests["ConfigMap", name]["data"]
    return values | {each["name"]: each["value"] for each in found["env"]}


@needs_kubectl
def test_the_overlay_is_valid_and_confined(manifests: dict[tuple[str, str], Resource]) -> None:
    for (kind, _), each in manifests.items():
        if not each["apiVersion"].startswith("monitoring.coreos.com/"):
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
        if kind == "StatefulSet":
            spec = each["spec"]["template"]["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["automountServiceAccountToken"] is False
            for held in (one["securityContext"] for one in spec["containers"]):
                assert held["readOnlyRootFilesystem"] is True
                assert held["capabilities"] == {"drop": ["ALL"]}


@needs_kubectl
@pytest.mark.parametrize(
    ("kind", "name", "of"), [("Deployment", "engine", "monitor"), ("StatefulSet", "fleet", "fleet")]
)
def test_who_shares_the_stream_finds_the_broker_over_tls(
    kind: str, name: str, of: str, manifests: dict[tuple[str, str], Resource]
) -> None:
    found, spec = container(manifests, kind, name, of)
    values = {
        key.removeprefix(PREFIX).lower(): value
        for key, value in environment(manifests, found).items()
        if key.startswith(PREFIX)
    }
    held = (FleetSettings if of == "fleet" else MonitorSettings)(**values)  # type: ignore[arg-type]
    assert not held.insecure
    scheme, _, address = held.nats.partition("://")
    assert scheme == "tls"
    host, _, port = address.partition(":")
    service = manifests["Service", host]["spec"]
    assert str(service["ports"][0]["port"]) == port
    broker = manifests["StatefulSet", "nats"]["spec"]["template"]
    assert service["selector"].items() <= broker["metadata"]["labels"].items()
    mounts = {each["name"]: each["mountPath"] for each in found["volumeMounts"]}
    assert {volume["name"] for volume in spec["volumes"]} >= {"nats-ca", "nats-token"}
    assert held.nats_ca == f"{mounts['nats-ca']}/ca.crt"
    assert held.nats_credentials == f"{mounts['nats-token']}/token"
    if of == "fleet":
        assert held.fleet_store.startswith(f"{mounts['store']}/")
        assert manifests["StatefulSet", "fleet"]["spec"]["replicas"] == 2
        assert found["args"] == ["fleet"]
        assert found["image"] == f"stream-monitor:{__version__}"


@needs_kubectl
def test_a_real_broker_takes_the_configuration_and_a_monitor_comes_in(
    manifests: dict[tuple[str, str], Resource], run: Callable[..., Running], tmp_path: Path
) -> None:
    """With certificates and a token made here, in the places of the Secrets."""
    found, _ = container(manifests, "StatefulSet", "nats", "nats")
    (name,) = (
        volume["configMap"]["name"]
        for volume in manifests["StatefulSet", "nats"]["spec"]["template"]["spec"]["volumes"]
        if "configMap" in volume
    )
    text = manifests["ConfigMap", name]["data"]["nats.conf"]
    assert "/etc/nats/nats.conf" in found["args"]
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    made = authority.issue_cert("localhost")
    (tmp_path / "tls.crt").write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
    made.private_key_pem.write_to_path(tmp_path / "tls.key")
    (tmp_path / "token").write_text("a-token")
    port, health = free_port(), free_port()
    for before, after in (
        ("0.0.0.0:4222", f"127.0.0.1:{port}"),
        ("0.0.0.0:8222", f"127.0.0.1:{health}"),
        ("/data", str(tmp_path / "data")),
        ("/etc/nats-tls", str(tmp_path)),
    ):
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "nats.conf").write_text(text)
    broker = subprocess.Popen(
        [PROGRAM, "--config", tmp_path / "nats.conf"],
        env={"NATS_TOKEN": "a-token"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        settings = {
            "nats": f"tls://localhost:{port}",
            "nats_ca": str(tmp_path / "ca.crt"),
            "nats_credentials": str(tmp_path / "token"),
        }
        monitor = run(**settings)
        until(lambda: monitor.metric("stream_monitor_nats_up") == 1)
        stranger = run(**(settings | {"nats_ca": "", "ingest": f"unix:{tmp_path}/other.sock"}))
        until(lambda: stranger.metric("stream_monitor_nats_failures_total", reason="tls") > 0)
    finally:
        broker.kill()
        broker.wait(20)
