"""A real `stream-monitor serve` in a process of its own, and what it and the kernel say about it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Monitor:
    """A running monitor, asked over its own ports.

    Attributes:
        ingest, grpc, http: its addresses.
        pid: of its process.
        log: its standard error.
    """

    def __init__(self, process: "subprocess.Popen[str]", ingest: str, log: Path) -> None:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready"), log.read_text()
        self.ingest, self.log, self.pid = ingest, log, process.pid
        self.grpc, self.http = line.split(" grpc ")[1].strip().split(", http ")
        self._open = build_opener(ProxyHandler({})).open

    def metrics(self) -> dict[str, float]:
        """Its metrics, each summed over its labels."""
        held: dict[str, float] = {}
        text = self._open(f"http://{self.http}/metrics", timeout=60).read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                held[sample.name] = held.get(sample.name, 0) + sample.value
        return held

    def settled_metrics(self) -> dict[str, float]:
        """The same once nothing waits to be stored any more."""
        while (held := self.metrics())["stream_monitor_store_queue_records"]:
            time.sleep(0.5)
        return held

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far (proc(5), fields 14 and 15 of stat)."""
        return cpu_seconds(self.pid)

    @property
    def resident_bytes(self) -> int:
        """Memory that is in RAM now."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def monitor(folder: Path, core: int | None = None, **settings: object) -> Iterator[Monitor]:
    """A monitor that keeps its files in `folder`; on one core if that is given. The other settings are its own."""
    os.chmod(folder, 0o700)
    ingest = f"unix:{folder}/ingest.sock"
    given = {"ingest": ingest, "grpc": "127.0.0.1:0", "http": "127.0.0.1:0"} | settings
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STREAM_MONITOR_")}
    log = folder / "monitor.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "stream_monitor", "serve", *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment | {"XDG_STATE_HOME": str(folder)},
            # Threads that the process begins inherit it.
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
    try:
        yield Monitor(process, ingest, log)
    finally:
        process.terminate()
        process.communicate()
