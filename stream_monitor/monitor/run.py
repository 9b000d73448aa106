"""`stream-monitor serve` and `stream-monitor fleet`: a server until SIGTERM or SIGINT."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable
from typing import Protocol

GRPC_LOG = "grpc._cython.cygrpc"
"""Where grpc.aio logs."""


GC_THRESHOLDS = (5_000, 4, 2)
"""Traces are many objects that live long and hold no cycles: looking for cycles among new objects as often as Python
does by default takes a twentieth of the processor time. All objects are looked at more often than by default, since
connections and calls that end by an error leave cycles, and those must not gather."""
SWITCH_SECONDS = 0.0005
"""How long a thread that wants the interpreter waits for one that does not let go. The store's thread wants it after
each statement, and findings wait for its commit: at Python's 5 ms a hundred statements may take half a second."""


class GoneWhileWrittenTo(logging.Filter):
    """Leaves out grpc.aio's traceback for a client that went away while it was sent something: that is no fault."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is another one."""
        return not record.getMessage().startswith("ExecuteBatchError raised in core")


class Server(Protocol):
    """A monitor, or a process of a fleet. `says` is told once it has started."""

    @property
    def says(self) -> str: ...

    @property
    def ends(self) -> "asyncio.Task[None] | None":
        """What ends early only if the server fails, with the reason; None if nothing does."""

    async def start(self) -> None:
        """Returns when it listens."""

    async def stop(self) -> None:
        """In order."""


async def serve(make: Callable[[], Server]) -> None:
    """Serve, say where on standard output, and stop in order on a signal. Raises what `make` and `start` do."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger(GRPC_LOG).addFilter(GoneWhileWrittenTo())
    server = make()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopping.set)
    await server.start()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(SWITCH_SECONDS)
    print(server.says, flush=True)
    if server.ends is not None:
        server.ends.add_done_callback(lambda _: stopping.set())
    await stopping.wait()
    failed = server.ends is not None and server.ends.done()
    print("stopping", flush=True)
    await server.stop()
    if failed and server.ends is not None:
        await server.ends
