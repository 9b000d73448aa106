"""The publisher's life: read the ring while the worker lives, then drain it and go."""

import asyncio
import os
import sys

from stream_monitor.publisher.backlog import Backlog
from stream_monitor.publisher.delivery import Delivery
from stream_monitor.publisher.launch import STOP
from stream_monitor.publisher.log import Log
from stream_monitor.records import EngineInfo
from stream_monitor.ring import RingReader
from stream_monitor.target import Target

BUSY_POLL, IDLE_POLL = 0.001, 0.02
"""Seconds between looks at the ring: after a record, and at most. The worker makes no call to wake anybody."""
SETTLE_SECONDS = 0.5
"""A loss that no later summary tells is sent on its own after so long without records."""
DRAIN_SECONDS = 2.0
"""For what is left in the ring and the backlog when the worker stops or is gone."""
_LAST_LOOK = 0.1
"""After the last record, so long for one that is still on its way from another core."""


class Publisher:
    """One ring to one monitor."""

    def __init__(self, reader: RingReader, info: EngineInfo, target: Target) -> None:
        self._reader = reader
        self._log = Log(f"tp{info.tensor_parallel_rank} pp{info.pipeline_parallel_rank}")
        self._backlog = Backlog(reader)
        self._delivery = Delivery(self._backlog, info, target, self._log)
        self._ended = asyncio.Event()

    async def run(self, lifeline: int) -> None:
        """Publish until the file descriptor `lifeline` ends, then drain."""
        asyncio.get_running_loop().add_reader(lifeline, self._on_lifeline, lifeline)
        delivery = asyncio.ensure_future(self._delivery.run())
        try:
            await self._follow()
            await self._drain(delivery)
        finally:
            delivery.cancel()
            await asyncio.wait((delivery,))
            self._reader.close()

    def _on_lifeline(self, lifeline: int) -> None:
        data = os.read(lifeline, 64)
        if STOP.strip() in data or not data:
            asyncio.get_running_loop().remove_reader(lifeline)
            self._ended.set()

    async def _follow(self) -> None:
        pause, idle_since = BUSY_POLL, 0.0
        clock = asyncio.get_running_loop().time
        while not self._ended.is_set():
            if self._backlog.take():
                pause, idle_since = BUSY_POLL, clock()
                self._delivery.wake.set()
            else:
                pause = min(pause * 1.5, IDLE_POLL)
                if clock() - idle_since > SETTLE_SECONDS and self._backlog.correct():
                    idle_since = clock()
                    self._delivery.wake.set()
            await asyncio.sleep(pause)

    async def _drain(self, delivery: asyncio.Future[None]) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + DRAIN_SECONDS
        last_look = clock() + _LAST_LOOK
        while clock() < deadline:
            if self._backlog.take():
                self._delivery.wake.set()
                last_look = clock() + _LAST_LOOK
            written = self._reader.written()
            read_all = written is not None and written.sequence == self._reader.mark.sequence
            if self._backlog.empty and (read_all or clock() > last_look):
                break
            await asyncio.sleep(BUSY_POLL)
        if self._backlog.correct(at_end=True):
            self._delivery.wake.set()
        self._delivery.finish()
        await asyncio.wait((delivery,), timeout=max(0.0, deadline - clock()))
        if not self._backlog.empty:
            self._log.say("lost", "ends with summaries that the monitor never answered")


def publish(ring_fd: int, info: EngineInfo, target: Target) -> None:
    """Run a publisher whose standard input is the link to its worker. Raises RingError if `ring_fd` is no ring."""
    reader = RingReader(ring_fd)

    async def main() -> None:
        await Publisher(reader, info, target).run(sys.stdin.fileno())

    asyncio.run(main())
