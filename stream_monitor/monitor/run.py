"""`stream-monitor serve`: a monitor until SIGTERM or SIGINT."""

import asyncio
import logging
import signal

from stream_monitor.config import MonitorSettings
from stream_monitor.monitor.server import MonitorServer

GRPC_LOG = "grpc._cython.cygrpc"
"""Where grpc.aio logs."""


class GoneWhileWrittenTo(logging.Filter):
    """Leaves out grpc.aio's traceback for a client that went away while it was sent something: that is no fault."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is another one."""
        return not record.getMessage().startswith("ExecuteBatchError raised in core")


async def serve(settings: MonitorSettings, version: str) -> None:
    """Serve, say where on standard output, and stop in order on a signal. Raises ListenError, TlsError, AccessError or
    StoreRefused."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger(GRPC_LOG).addFilter(GoneWhileWrittenTo())
    monitor = MonitorServer(settings, version)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopping.set)
    await monitor.start()
    metrics = f", metrics {monitor.metrics_address}" if settings.metrics else ""
    print(
        f"ready: ingest {monitor.ingest_address}, grpc {monitor.grpc_address}, http {monitor.http_address}{metrics}",
        flush=True,
    )
    await stopping.wait()
    print("stopping", flush=True)
    await monitor.stop()
