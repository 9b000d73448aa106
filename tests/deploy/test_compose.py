"""The compose files, read by Docker Compose itself, and the configuration they mount into each service."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream_monitor import __version__
from stream_monitor.config import CaptureSettings, MonitorSettings
from stream_monitor.monitor.listen import check_exposure
from tests.deploy.installed import ROOT
from tests.deploy.test_docker import ENGINE, MONITOR, instructions

COMPOSE = ROOT / "deploy" / "compose"
FILES = {"cpu": ["compose.yaml"], "gpu": ["compose.yaml", "compose.gpu.yaml"]}


def configuration(name: str) -> dict[str, Any]:
    """What Docker Compose makes of the files."""
    program = Path(sys.executable).with_name("docker-compose")
    files = [argument for file in FILES[name] for argument in ("-f", str(COMPOSE / file))]
    done = subprocess.run([program, *files, "config", "--format=json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held: dict[str, Any] = json.loads(done.stdout)
    return held


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """Files and folders of the repository, by where the service sees them."""
    return {each["target"]: Path(each["source"]) for each in service["volumes"] if each["type"] == "bind"}


@pytest.mark.parametrize("name", FILES)
def test_everything_that_is_mounted_or_built_exists(name: str) -> None:
    services = configuration(name)["services"]
    assert set(services) == {"engine", "monitor", "prometheus", "alertmanager", "grafana"}
    for service in services.values():
        for source in mounts(service).values():
            assert source.exists(), source
        if "build" in service:
            assert (Path(service["build"]["context"]) / service["build"]["dockerfile"]).exists()
            assert re.fullmatch(rf"stream-monitor(-engine)?:{re.escape(__version__)}(-cpu)?", service["image"])
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "pinned"


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_published_beyond_loopback(name: str) -> None:
    ports = [port for service in configuration(name)["services"].values() for port in service["ports"]]
    assert len(ports) == 6
    assert all(port["host_ip"] == "127.0.0.1" for port in ports)


@pytest.mark.parametrize("name", FILES)
def test_engine_and_monitor_meet_at_the_socket_of_a_shared_volume(name: str) -> None:
    services = configuration(name)["services"]
    engine, monitor = services["engine"], services["monitor"]
    image = dict(re.findall(r"(\w+)=(\S+)", " ".join(value for key, value in instructions(MONITOR) if key == "ENV")))
    target = engine["environment"]["STREAM_MONITOR_TARGET"]
    assert target == image["STREAM_MONITOR_INGEST"]
    for service in (engine, monitor):
        volumes = {each["source"]: each["target"] for each in service["volumes"] if each["type"] == "volume"}
        assert target.startswith(f"unix:{volumes['ingest']}/")
    settings = _settings(monitor["environment"])
    checked = MonitorSettings(**settings)  # type: ignore[arg-type]
    for address in ("grpc", "http", "metrics"):
        check_exposure(address, getattr(checked, address), checked.insecure)
    CaptureSettings(**_settings(engine["environment"]))  # type: ignore[arg-type]
    assert monitor["read_only"] is True
    assert monitor["cap_drop"] == ["ALL"]


def _settings(environment: dict[str, str]) -> dict[str, str]:
    prefix = "STREAM_MONITOR_"
    return {key.removeprefix(prefix).lower(): value for key, value in environment.items() if key.startswith(prefix)}


def test_the_gpu_file_takes_vllms_image_for_gpus() -> None:
    (default,) = (value for key, value in instructions(ENGINE) if key == "ARG" and value.startswith("VLLM_IMAGE="))
    built = {name: configuration(name)["services"]["engine"] for name in FILES}
    assert built["gpu"]["build"]["args"]["VLLM_IMAGE"] == default.partition("=")[2]
    assert "cpu" in built["cpu"]["build"]["args"]["VLLM_IMAGE"]
    assert built["gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    assert "deploy" not in built["cpu"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed; make tools does it")
def test_prometheus_accepts_what_it_is_given(tmp_path: Path) -> None:
    services = configuration("cpu")["services"]
    service = services["prometheus"]
    for target, source in mounts(service).items():
        staged = tmp_path / Path(target).relative_to("/etc/prometheus")
        shutil.copytree(source, staged) if source.is_dir() else shutil.copy(source, staged)
    done = subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rules = sorted((ROOT / "deploy" / "prometheus").glob("*.yaml"))
    assert len(rules) >= 2
    assert all(file.name in done.stdout for file in rules), "each file of rules is loaded"
    assert "--enable-feature=exemplar-storage" in service["command"]
    scraped = yaml.safe_load((tmp_path / "prometheus.yaml").read_text())
    for job in scraped["scrape_configs"]:
        # Targets in a file are the fleet's (test_fleet.py).
        for target in job.get("static_configs", [{"targets": ()}])[0]["targets"]:
            host, _, port = target.partition(":")
            listened = {str(each["target"]) for each in services[host]["ports"]}
            assert port in listened | {
                services[host]["environment"].get("STREAM_MONITOR_METRICS", "").rpartition(":")[2]
            }
    (alerts,) = scraped["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert alerts.partition(":")[0] in services


@pytest.mark.skipif(not shutil.which("amtool"), reason="amtool is not installed; make tools does it")
def test_alertmanager_accepts_what_it_is_given() -> None:
    service = configuration("cpu")["services"]["alertmanager"]
    (folder,) = mounts(service).values()
    (named,) = (part.partition("=")[2] for part in service["command"] if part.startswith("--config.file="))
    done = subprocess.run(["amtool", "check-config", folder / Path(named).name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_grafana_finds_its_datasource_and_the_dashboard() -> None:
    service = configuration("cpu")["services"]["grafana"]
    mounted = mounts(service)
    datasources = yaml.safe_load(mounted["/etc/grafana/provisioning/datasources/stream-monitor.yaml"].read_text())
    (datasource,) = datasources["datasources"]
    assert datasource["url"] == "http://prometheus:9090"
    providers = yaml.safe_load(mounted["/etc/grafana/provisioning/dashboards/stream-monitor.yaml"].read_text())
    folder = providers["providers"][0]["options"]["path"]
    home = service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(folder + "/")
    assert json.loads(mounted[home].read_text())["title"]
