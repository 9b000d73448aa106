"""Client of a running monitor: events that resume by cursor, traces as numpy arrays, lists, deletion.

`Monitor` blocks, `AsyncMonitor` is for asyncio; both have the same methods. It needs grpcio, protobuf and numpy.
"""

from stream_monitor.client.aio import AsyncMonitor
from stream_monitor.client.blocking import Monitor
from stream_monitor.client.connection import MonitorError
from stream_monitor.client.subscription import Received
from stream_monitor.client.trace import Entries, HeadEntries, Trace
from stream_monitor.target import Target, TargetError

__all__ = [
    "AsyncMonitor",
    "Entries",
    "HeadEntries",
    "Monitor",
    "MonitorError",
    "Received",
    "Target",
    "TargetError",
    "Trace",
]
