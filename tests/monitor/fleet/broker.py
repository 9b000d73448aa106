"""A real nats-server with JetStream, which a test may kill and start again on the same folder."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import nats
from nats.js import JetStreamContext

from tests.monitor.process import free_port

PROGRAM = Path(sys.executable).with_name("nats-server")
STREAM = "STREAM_MONITOR"
T = TypeVar("T")


class NatsServer:
    """Always at the same port of loopback, with what it keeps in `folder`."""

    def __init__(self, folder: Path, configuration: str = "", jetstream: bool = True) -> None:
        self.folder = folder / "jetstream"
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self.log = folder / "nats.log"
        self._configuration = folder / "nats.conf"
        stored = f'jetstream {{ store_dir: "{self.folder}" }}\n' if jetstream else ""
        self._configuration.write_text(f"listen: 127.0.0.1:{self.port}\n{stored}{configuration}\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "NatsServer":
        """Returns when it is ready."""
        self.log.write_text("")
        command = [PROGRAM, "-c", self._configuration, "-l", self.log]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while "Server is ready" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return self

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal that ends it, and wait until it has ended."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(20)

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def holds(self, words: bytes) -> bool:
        """Whether any of its files has these bytes."""
        return any(words in path.read_bytes() for path in self.folder.rglob("*") if path.is_file())

    def ask(self, work: Callable[[JetStreamContext], Awaitable[T]], **options: str) -> T:
        """Something done with a plain client, as a foreign subscriber would."""

        async def run() -> T:
            client = await nats.connect(self.url, **options)  # type: ignore[arg-type]
            try:
                return await work(client.jetstream())
            finally:
                await client.close()

        return asyncio.run(asyncio.wait_for(run(), 20))
