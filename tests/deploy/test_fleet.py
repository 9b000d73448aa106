"""What `deploy/` has for a fleet: the compose file, and the alerts."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream_monitor import __version__
from stream_monitor.config import FleetSettings, MonitorSettings
from stream_monitor.monitor.fleet.metric_table import FLEET_TABLE
from stream_monitor.monitor.metric_table import TABLE
from tests.deploy.installed import ROOT
from tests.deploy.promql import metrics_in

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
