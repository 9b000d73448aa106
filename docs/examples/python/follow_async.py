"""The same subscription beside other work, with asyncio: prints findings of running requests and how many run.

python follow_async.py [ADDRESS]
"""

import asyncio
import sys

from stream_monitor.client import AsyncMonitor
from stream_monitor.v1alpha1 import monitor_pb2

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9750"


async def findings(monitor: AsyncMonitor) -> None:
    async for received in monitor.subscribe(last=10):
        print(f"{received.event.external_id}: {received.event.summary}", flush=True)


async def running(monitor: AsyncMonitor) -> None:
    while True:
        infos = [info async for info in monitor.list_requests()]
        count = sum(info.state == monitor_pb2.REQUEST_STATE_RUNNING for info in infos)
        print(f"{count} of {len(infos)} requests run", flush=True)
        await asyncio.sleep(5)


async def main() -> None:
    async with AsyncMonitor(address) as monitor:
        await asyncio.gather(findings(monitor), running(monitor))


asyncio.run(main())
