"""A host as a reader of the pages has it: default ports free, no network, a home, a monitor that holds a request."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc
from tests.docs.blocks import ROOT
from tests.monitor.synthetic import Engine

TIMEOUT = 60


def isolation() -> list[str] | None:
    """How to begin a command with a network of its own; None if this machine does not allow it."""
    command = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or not shutil.which("nsenter") or not shutil.which("ip"):
        return None
    return (
        None if subprocess.run([*command, "ip", "link", "set", "lo", "up"], capture_output=True).returncode else command
    )


class World:
    """A network namespace with a loopback device, a home folder, and links to the repository as the current folder."""

    def __init__(self, folder: Path, holder: subprocess.Popen[bytes]) -> None:
        self.folder = folder / "clone"
        self.runtime = folder / "run"
        self.holder = holder
        self.requests = 0
        home = folder / "home"
        for each in (self.folder, self.runtime, home):
            each.mkdir(mode=0o700)
        for entry in ROOT.iterdir():
            if entry.name not in (".git", ".cache"):
                (self.folder / entry.name).symlink_to(entry)
        kept = {key: os.environ[key] for key in ("LANG", "LC_ALL") if key in os.environ}
        self.environment = kept | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "COLUMNS": "120",
        }

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        """A process in this world, in a group of its own, its errors among its output."""
        enter = ["nsenter", f"--target={self.holder.pid}", "--net"]
        if os.geteuid() != 0:
            enter += ["--user", "--preserve-credentials"]
        return subprocess.Popen(
            [*enter, *command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def run(self, command: list[str]) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(command)
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        finally:
            end(process)
        return process.returncode, output

    def run_until(self, command: list[str], words: str) -> str:
        """Output up to the line with these words, while new requests come in; then it is interrupted."""
        process = self.start(command)
        assert process.stdout is not None
        seen, deadline = "", time.monotonic() + TIMEOUT
        try:
            while words not in seen:
                assert time.monotonic() < deadline, f"no {words!r} in: {seen}"
                if select.select([process.stdout], [], [], 1.0)[0]:
                    # Not `readline`: lines that it had read ahead would be hidden from `select`.
                    read = os.read(process.stdout.fileno(), 65536)
                    assert read, f"ended without {words!r}: {seen}"
                    seen += read.decode(errors="replace")
                elif self.monitored:
                    self.publish(f"chatcmpl-live-{self.requests}")
        finally:
            end(process)
        return seen

    @property
    def monitored(self) -> bool:
        """Whether a monitor listens where publishers look for one."""
        return (self.runtime / "stream-monitor" / "ingest.sock").exists()

    def publish(self, external_id: str) -> None:
        """A finished request whose anchors shift, from an engine of its own."""
        self.requests += 1
        summaries = Engine().request(f"{external_id}-aee6d49e", [4] * 14 + [30] * 8)
        with grpc.insecure_channel(f"unix:{self.runtime}/stream-monitor/ingest.sock") as channel:
            requests = [ingest_pb2.PublishRequest(summary=summary) for summary in summaries]
            list(ingest_pb2_grpc.IngestServiceStub(channel).Publish(iter(requests), timeout=TIMEOUT))


@contextmanager
def world(folder: Path, monitor: bool) -> Iterator[World]:
    """A new world; with a monitor, it holds the finished requests `chatcmpl-my-req-1` and `chatcmpl-my-req-2`."""
    command = isolation()
    assert command is not None
    holder = subprocess.Popen(
        [*command, "sh", "-c", "ip link set lo up && echo up && exec sleep 3600"], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        here = World(folder, holder)
        if not monitor:
            yield here
            return
        serving = here.start(["stream-monitor", "serve"])
        assert serving.stdout is not None
        assert serving.stdout.readline().startswith("ready: ")
        try:
            for number in (1, 2):
                here.publish(f"chatcmpl-my-req-{number}")
            yield here
        finally:
            end(serving)
    finally:
        holder.kill()
        holder.communicate()


def end(process: subprocess.Popen[str]) -> None:
    """Interrupt the process and what it started, as Ctrl-C does; by force if that is not enough."""
    for each in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, each)
            try:
                process.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                continue
