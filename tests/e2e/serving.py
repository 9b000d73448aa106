"""The product as an operator runs it: `stream-monitor serve` beside vLLM's own server, each a process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 300


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Product:
    """Monitor and engine in `folder`; `stop` ends both, whatever they started included."""

    def __init__(self, model: Path, folder: Path, engine_flags: list[str], **settings: object) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {name: free_port() for name in ("grpc", "http", "engine")}
        self.grpc_address = f"127.0.0.1:{self._ports['grpc']}"
        self.monitor_http = f"http://127.0.0.1:{self._ports['http']}"
        self.engine_http = f"http://127.0.0.1:{self._ports['engine']}"
        self._target = f"unix:{folder / 'ingest.sock'}"
        self._environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "STREAM_MONITOR_TARGET": self._target,
            "STREAM_MONITOR_MAX_OVERHEAD": "0",  # tests ask for rows whatever they cost
            **{f"STREAM_MONITOR_{key.upper()}": str(value) for key, value in settings.items()},
        }
        self.start_monitor()
        port = str(self._ports["engine"])
        self._start("engine", "vllm", str(model), "--host", "127.0.0.1", "--port", port, *engine_flags)
        self.wait_for(f"{self.engine_http}/health", "engine")

    def start_monitor(self) -> None:
        """Start the monitor (again) on the same addresses and wait until it is ready."""
        http = self.monitor_http.removeprefix("http://")
        self._start("monitor", "serve", "--ingest", self._target, "--grpc", self.grpc_address, "--http", http)
        self.wait_for(f"{self.monitor_http}/readyz", "monitor")

    def kill_monitor(self) -> None:
        """End the monitor without a chance to say goodbye."""
        self._processes["monitor"].kill()
        self._processes["monitor"].wait()

    def _start(self, name: str, *arguments: str) -> None:
        log = (self._folder / f"{name}.log").open("ab")
        command = [sys.executable, "-m", "stream_monitor", *arguments]
        self._processes[name] = subprocess.Popen(
            command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait_for(self, url: str, name: str) -> None:
        """Until `url` answers 200; fails with the log's end if the process ends first."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self._processes[name].poll() is None, self.log(name)[-4000:]
            try:
                if httpx.get(url, timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"{name} not ready: {self.log(name)[-4000:]}")

    def log(self, name: str) -> str:
        """What a process printed so far."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def stop(self) -> None:
        """SIGTERM to each process group, SIGKILL to what is left after a while."""
        for process in reversed(self._processes.values()):
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    process.wait(20)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def samples(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a Prometheus exposition by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text)
        for sample in family.samples
    }


def total(url: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples that carry these labels."""
    wanted = set(labels.items())
    return sum(value for (sample, found), value in samples(url).items() if sample == name and wanted <= found)


def eventually(check: Callable[[], bool], seconds: float) -> bool:
    """Whether `check` holds within that time."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
