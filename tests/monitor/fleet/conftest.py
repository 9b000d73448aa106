"""Brokers, monitors and processes of a fleet, ended with the test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.monitor.fleet.broker import NatsServer
from tests.monitor.fleet.processes import FleetProcess
from tests.monitor.process import MonitorProcess


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path).start()
    yield server
    server.end()


@pytest.fixture
def sidecar(tmp_path: Path, broker: NatsServer) -> Iterator[Callable[..., MonitorProcess]]:
    """Starts monitors that publish to the broker, by name."""
    started: list[MonitorProcess] = []

    def start(name: str, **settings: object) -> MonitorProcess:
        folder = tmp_path / name
        folder.mkdir(mode=0o700)
        started.append(MonitorProcess(folder, **({"nats": broker.url} | settings)))
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture
def fleet(tmp_path: Path, broker: NatsServer) -> Iterator[Callable[..., FleetProcess]]:
    """Starts processes of the fleet, by name."""
    started: list[FleetProcess] = []

    def start(name: str, ready: bool = True, **settings: object) -> FleetProcess:
        started.append(FleetProcess(tmp_path / name, broker.url, **settings))
        return started[-1].start(ready)

    yield start
    for each in started:
        each.end()
