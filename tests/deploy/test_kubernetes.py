"""The manifests, as `kubectl kustomize` builds them: valid for the current API, and meaning what they should."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from stream_monitor import __version__
from stream_monitor.addresses import is_local
from stream_monitor.config import CaptureSettings, MonitorSettings
from stream_monitor.monitor.access.book import Book
from stream_monitor.monitor.listen import check_exposure
from tests.deploy.installed import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
BUILDS = {
    "base": KUBERNETES / "base",
    "gpu": KUBERNETES / "overlays" / "gpu",
    "fleet": KUBERNETES / "overlays" / "fleet",
}
OPERATOR = "monitoring.coreos.com/v1"
"""The Prometheus Operator's resources, whose schemas no package brings: looked at by hand below."""

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed; make tools does it")

Resource = dict[str, Any]


@cache
def built(name: str) -> tuple[Resource, ...]:
    done = subprocess.run(["kubectl", "kustomize", BUILDS[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def resource(build: str, kind: str, name: str) -> Resource:
    (found,) = (each for each in built(build) if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def pod(build: str, name: str) -> Resource:
    return resource(build, "Deployment", name)["spec"]["template"]


def containers(template: Resource) -> dict[str, Resource]:
    spec = template["spec"]
    return {each["name"]: each for each in [*spec.get("initContainers", ()), *spec["containers"]]}


def environment(build: str, container: Resource) -> dict[str, str]:
    """Variables of a container, ConfigMaps included."""
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        values |= resource(build, "ConfigMap", source["configMapRef"]["name"])["data"]
    return values | {each["name"]: each["value"] for each in container.get("env", ())}


def every_pod() -> list[tuple[str, str]]:
    return [("base", "engine"), ("gpu", "engine"), ("fleet", "engine"), ("fleet", "monitor")]


@pytest.mark.parametrize("build", BUILDS)
def test_everything_is_valid_for_the_current_api(build: str) -> None:
    checked = 0
    for each in built(build):
        if each["apiVersion"] != OPERATOR:
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize(("build", "name"), every_pod())
def test_every_container_is_confined(build: str, name: str) -> None:
    template = pod(build, name)
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    # Kubernetes would name a service's variables STREAM_MONITOR_..., and settings that do not exist are refused.
    assert spec["enableServiceLinks"] is False
    for container in containers(template).values():
        held = container["securityContext"]
        assert held["runAsUser"] > 0
        assert held["readOnlyRootFilesystem"] is True
        assert held["allowPrivilegeEscalation"] is False
        assert held["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])


@pytest.mark.parametrize("build", ["base", "gpu"])
def test_the_sidecar_can_never_gate_serving(build: str) -> None:
    template = pod(build, "engine")
    (sidecar,) = template["spec"]["initContainers"]
    # A native sidecar: without this it would be an init container, and the engine would wait for its end.
    assert sidecar["restartPolicy"] == "Always"
    assert "livenessProbe" in sidecar
    assert "readinessProbe" not in sidecar
    assert "startupProbe" not in sidecar
    assert "postStart" not in sidecar.get("lifecycle", {})
    (engine,) = template["spec"]["containers"]
    ports = {port["name"] for port in sidecar["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert engine[probe]["httpGet"]["port"] not in ports


@pytest.mark.parametrize("build", ["base", "gpu"])
def test_engine_and_sidecar_meet_at_one_socket(build: str) -> None:
    template = pod(build, "engine")
    sidecar, engine = containers(template)["monitor"], containers(template)["engine"]
    ingest = environment(build, sidecar)["STREAM_MONITOR_INGEST"]
    assert environment(build, engine)["STREAM_MONITOR_TARGET"] == ingest
    mounts = [
        {each["name"]: each["mountPath"] for each in container["volumeMounts"]} for container in (sidecar, engine)
    ]
    shared = mounts[0]["ingest"]
    assert mounts[1]["ingest"] == shared
    # In a folder below the volume's root, which belongs to root; the monitor uses no folder of another user.
    parent = ingest.removeprefix("unix:").rpartition("/")[0]
    assert parent.startswith(shared + "/")
    group = template["spec"]["securityContext"]["fsGroup"]
    # The socket gets the monitor's group, and every container has the pod's.
    assert sidecar["securityContext"]["runAsGroup"] == group
    assert sidecar["securityContext"]["runAsUser"] != engine["securityContext"]["runAsUser"]


def test_in_a_fleet_engines_publish_to_the_central_monitor() -> None:
    assert not pod("fleet", "engine")["spec"].get("initContainers")
    target = environment("fleet", containers(pod("fleet", "engine"))["engine"])["STREAM_MONITOR_TARGET"]
    name, _, port = target.partition(":")
    service = resource("fleet", "Service", name)
    monitor = containers(pod("fleet", "monitor"))["monitor"]
    (wanted,) = (each["targetPort"] for each in service["spec"]["ports"] if each["port"] == int(port))
    (listened,) = (each["containerPort"] for each in monitor["ports"] if each["name"] == wanted)
    assert environment("fleet", monitor)["STREAM_MONITOR_INGEST"] == f"0.0.0.0:{listened}"
    assert service["spec"]["selector"].items() <= pod("fleet", "monitor")["metadata"]["labels"].items()
    assert monitor["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert monitor["livenessProbe"]["httpGet"]["path"] == "/healthz"
    held = resource("fleet", "Deployment", "monitor")["spec"]
    assert (held["replicas"], held["strategy"]) == (1, {"type": "Recreate"})
    # No engine waits for it.
    assert all(probe not in str(pod("fleet", "engine")) for probe in ("readyz", "healthz"))


@pytest.mark.parametrize(("build", "name"), every_pod())
def test_settings_exist_and_are_sound(build: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for container in containers(pod(build, name)).values():
        values = {
            key.removeprefix("STREAM_MONITOR_").lower(): value
            for key, value in environment(build, container).items()
            if key.startswith("STREAM_MONITOR_")
        }
        assert values
        if container["name"] == "engine":
            CaptureSettings(**values).monitor()  # type: ignore[arg-type]
            continue
        settings = MonitorSettings(**values)  # type: ignore[arg-type]
        assert not settings.insecure
        for address in ("ingest", "grpc", "http"):
            check_exposure(address, getattr(settings, address), bool(settings.tls_certificate))
        # Alone in the clear: metrics, which hold no traces.
        assert settings.metrics_insecure
        assert not is_local(settings.metrics)


def secret_files(template: Resource) -> dict[str, tuple[str, str | None]]:
    """Where files of Secrets appear in the first container, or a folder of them: the Secret, and the key if named."""
    found: dict[str, tuple[str, str | None]] = {}
    mounts = {each["name"]: each for each in template["spec"]["containers"][0]["volumeMounts"]}
    for volume in (each for each in template["spec"]["volumes"] if "secret" in each):
        # For the group that fsGroup gives the files, and nobody else.
        assert volume["secret"]["defaultMode"] == 0o440
        mount = mounts[volume["name"]]
        assert mount["readOnly"] is True
        items = volume["secret"].get("items")
        for item in items or [{"path": "*", "key": None}]:
            found[f"{mount['mountPath']}/{item['path']}"] = (volume["secret"]["secretName"], item["key"])
    return found


def test_the_fleet_speaks_tls_with_tokens_from_secrets() -> None:
    monitor, engine = pod("fleet", "monitor"), pod("fleet", "engine")
    values = environment("fleet", containers(engine)["engine"])
    assert secret_files(engine) == {
        values["STREAM_MONITOR_TARGET_CA"]: ("monitor-tls", "ca.crt"),
        "/etc/stream-monitor/token/*": ("engine-token", None),
    }
    assert values["STREAM_MONITOR_TARGET_TOKEN_FILE"] == "/etc/stream-monitor/token/token"
    values = environment("fleet", containers(monitor)["monitor"])
    assert secret_files(monitor) == {
        "/etc/stream-monitor/tls/*": ("monitor-tls", None),
        "/etc/stream-monitor/access/*": ("monitor-access", None),
    }
    assert values["STREAM_MONITOR_TLS_CERTIFICATE"] == "/etc/stream-monitor/tls/tls.crt"
    assert values["STREAM_MONITOR_TLS_KEY"] == "/etc/stream-monitor/tls/tls.key"
    assert values["STREAM_MONITOR_ACCESS"] == "/etc/stream-monitor/access/access.toml"


def test_the_access_file_of_the_pages_is_one(tmp_path: Path) -> None:
    """That of docs/install.md, which is made into a Secret; and that of docs/security.md."""
    for page in ("install", "security"):
        text = (ROOT / "docs" / f"{page}.md").read_text()
        (content,) = (block for block in re.findall(r"```toml\n(.*?)```", text, re.S) if "[[principal]]" in block)
        whole = re.sub(r'"[0-9a-f]{4}\.\.\.[0-9a-f]{4}"', lambda found: f'"{found.start():064x}"', content)
        (tmp_path / "access.toml").write_text(whole)
        Book(str(tmp_path / "access.toml"))


@pytest.mark.parametrize(("build", "name"), [("base", "engine"), ("gpu", "engine"), ("fleet", "monitor")])
def test_the_memory_limit_holds_what_the_settings_allow(build: str, name: str) -> None:
    container = containers(pod(build, name))["monitor"]
    traces = int(environment(build, container)["STREAM_MONITOR_MAX_TRACE_BYTES"])
    ((number, unit),) = re.findall(r"^(\d+)(Mi|Gi)$", container["resources"]["limits"]["memory"])
    # A monitor without traces, and resident memory over what is counted.
    text = " ".join((ROOT / "docs" / "sizing.md").read_text().split())
    (empty, over), *_ = re.findall(r"For a container: (\d+) MiB, and ([\d.]+) times `max_trace_bytes`", text)
    assert int(number) << {"Mi": 20, "Gi": 30}[unit] >= float(over) * traces + (int(empty) << 20)


@pytest.mark.parametrize(("build", "name"), every_pod())
def test_volumes_are_there_and_used(build: str, name: str) -> None:
    template = pod(build, name)
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    used = {mount["name"] for container in containers(template).values() for mount in container["volumeMounts"]}
    assert used == volumes


def test_images_are_those_of_this_release() -> None:
    for build, name in every_pod():
        for container in containers(pod(build, name)).values():
            image, _, tag = container["image"].partition(":")
            assert image in ("stream-monitor", "stream-monitor-engine")
            assert tag.removesuffix("-cpu") == __version__


def test_the_gpu_overlay_asks_for_a_gpu_and_the_base_does_not() -> None:
    limits = {
        build: containers(pod(build, "engine"))["engine"]["resources"]["limits"].get("nvidia.com/gpu")
        for build in BUILDS
    }
    assert limits == {"base": None, "gpu": "1", "fleet": "1"}


@pytest.mark.parametrize("build", BUILDS)
def test_pod_monitors_name_ports_of_the_pods_they_select(build: str) -> None:
    endpoints = 0
    templates = [each["spec"]["template"] for each in built(build) if each["kind"] == "Deployment"]
    for monitor in (each for each in built(build) if each["kind"] == "PodMonitor"):
        assert monitor["apiVersion"] == OPERATOR
        assert set(monitor["spec"]) == {"selector", "podMetricsEndpoints"}
        wanted = monitor["spec"]["selector"]["matchLabels"]
        (template,) = (each for each in templates if wanted.items() <= each["metadata"]["labels"].items())
        offered = {port["name"] for container in containers(template).values() for port in container.get("ports", ())}
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert set(endpoint) == {"port", "path", "interval"}
            assert endpoint["port"] in offered
            endpoints += 1
    assert endpoints == 2


def test_the_rules_are_those_of_prometheus() -> None:
    """Made from the same files; the Operator's resource has a rule file's content as its `spec`."""
    printed = subprocess.run(
        [sys.executable, KUBERNETES / "prometheus_rule.py"], check=True, capture_output=True, text=True
    ).stdout
    assert (KUBERNETES / "base" / "prometheusrule.yaml").read_text() == printed, "run make manifests"
    for build in BUILDS:
        rule = resource(build, "PrometheusRule", "stream-monitor")
        assert rule["apiVersion"] == OPERATOR
        assert set(rule["spec"]) == {"groups"}
        files = sorted((ROOT / "deploy" / "prometheus").glob("*.yaml"))
        assert rule["spec"]["groups"] == [
            group for file in files for group in yaml.safe_load(file.read_text())["groups"]
        ]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed; make tools does it")
def test_the_rules_of_the_operators_resource_are_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(resource("base", "PrometheusRule", "stream-monitor")["spec"]))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("build", BUILDS)
def test_grafana_finds_the_dashboard_by_its_label(build: str) -> None:
    held = resource(build, "ConfigMap", "stream-monitor-dashboard")
    assert held["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard = (ROOT / "deploy" / "grafana" / "stream-monitor.json").read_text()
    assert held["data"] == {"stream-monitor.json": dashboard}
    # What `kubectl apply` writes beside it into an annotation has to fit as well.
    assert len(json.dumps(held)) < 256 << 10


def test_grafana_finds_the_dashboard_of_a_fleet() -> None:
    command = ["kubectl", "kustomize", KUBERNETES / "overlays" / "nats"]
    built = subprocess.run(command, capture_output=True, text=True, check=True)
    maps = (each for each in yaml.safe_load_all(built.stdout) if each["kind"] == "ConfigMap")
    (held,) = (each for each in maps if each["metadata"]["name"] == "stream-monitor-fleet-dashboard")
    assert held["metadata"]["labels"]["grafana_dashboard"] == "1"
    name = "stream-monitor-fleet.json"
    assert held["data"] == {name: (ROOT / "deploy" / "grafana" / "fleet" / name).read_text()}


@pytest.mark.parametrize("build", BUILDS)
def test_the_monitor_is_closed_to_all_but_those_who_need_it(build: str) -> None:
    templates = {
        each["metadata"]["name"]: each["spec"]["template"] for each in built(build) if each["kind"] == "Deployment"
    }
    for name, template in templates.items():
        policy = resource(build, "NetworkPolicy", name)
        selected = policy["spec"]["podSelector"]["matchLabels"]
        assert selected.items() <= template["metadata"]["labels"].items()
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        offered = {port["name"] for container in containers(template).values() for port in container.get("ports", ())}
        for rule in policy["spec"]["ingress"]:
            ports = {port["port"] for port in rule["ports"]}
            assert ports <= offered
            # vLLM's API is as open as it was; whatever shows traces is not.
            assert "from" in rule or ports == {"http"}
