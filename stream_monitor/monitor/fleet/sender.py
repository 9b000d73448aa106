"""A monitor's side of the stream: publishes what waits in the outbox, and hears which requests others deleted.

All of it runs beside the monitor's work and in its own time. A broker that is away, slow or full makes the outbox
longer, nothing else.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from stream_monitor.monitor.archive import StoreUnavailable
from stream_monitor.monitor.deletion import DeletionUnfinished
from stream_monitor.monitor.fleet import messages, names
from stream_monitor.monitor.fleet.broker import Broker, BrokerTrouble, Session
from stream_monitor.monitor.fleet.ending import end
from stream_monitor.monitor.fleet.outbox import TOO_LARGE, Outbox, Waiting

IDLE_SECONDS = 0.5
"""How often the outbox is looked into where nobody says that something is in it."""
TIDY_SECONDS = 5.0
PAUSE_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""After messages that the broker did not take."""
DELETE_SECONDS = 20.0
"""How long a deletion may take to reach the stream; beyond it, it goes on by itself."""

log = logging.getLogger(__name__)


class Sender:
    """Attributes:
    sent: messages that the broker acknowledged, by record.
    shortened: traces that were published without the matrices of single heads.
    """

    def __init__(self, broker: Broker, outbox: Outbox) -> None:
        self.broker = broker
        self.outbox = outbox
        self.sent: Counter[str] = Counter()
        self.shortened = 0
        self._woken = asyncio.Event()
        self._emptied = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to publish."""
        self._tasks = [asyncio.create_task(each) for each in (self._forever(self._send), self._forever(self._tidy))]

    def wake(self) -> None:
        """Something is in the outbox."""
        self._woken.set()

    async def stop(self, seconds: float) -> None:
        """Publish what waits, if that takes no longer, and end."""
        self._emptied.clear()
        self._woken.set()
        if self._tasks and self.broker.current is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), seconds)
        await end(*self._tasks)
        await self.broker.close()

    async def delete(self, hashes: Iterable[str]) -> None:
        """Have requests, by their hashes, leave the stream. Raises DeletionUnfinished where that takes its time."""
        gone = set(hashes)
        waits = DeletionUnfinished(
            f"gone from this monitor; {self.broker.address} still holds it ({self.broker.trouble or 'it is slow'}), "
            "and it is removed from there, and from the fleet, as soon as that is possible"
        )
        writing = asyncio.ensure_future(self.outbox.delete(gone))
        done, _ = await asyncio.wait({writing}, timeout=DELETE_SECONDS)
        if not done:
            raise waits
        writing.result()
        self._woken.set()
        if self.broker.current is None:
            raise waits
        deadline = asyncio.get_running_loop().time() + DELETE_SECONDS
        while gone & {waiting.deleted for waiting in await self.outbox.next()}:
            if asyncio.get_running_loop().time() > deadline or self.broker.current is None:
                raise waits
            await asyncio.sleep(0.02)

    async def _forever(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except (StoreUnavailable, BrokerTrouble):
                await asyncio.sleep(PAUSE_SECONDS[1])
            except Exception:
                log.exception("nats: a fault of the monitor; it goes on in ten seconds")
                await asyncio.sleep(PAUSE_SECONDS[-1])

    async def _tidy(self) -> None:
        await self.outbox.tidy()
        await asyncio.sleep(TIDY_SECONDS)

    async def _send(self) -> None:
        """Publish for as long as there is something and the broker takes it."""
        failures = 0
        while True:
            session = await self.broker.session()
            self._woken.clear()
            batch = await self.outbox.next()
            if not batch:
                self._emptied.set()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), IDLE_SECONDS)
                continue
            outcomes = await asyncio.gather(*(self._publish(session, waiting) for waiting in batch))
            await self.outbox.done(waiting.number for waiting, done in zip(batch, outcomes, strict=True) if done)
            if all(outcomes):
                self.broker.worked()
                failures = 0
                continue
            await asyncio.sleep(PAUSE_SECONDS[min(failures, len(PAUSE_SECONDS) - 1)])
            failures += 1

    async def _publish(self, session: Session, waiting: Waiting) -> bool:
        """Whether it need not be published again."""
        try:
            if waiting.gone:
                self.outbox.lost[waiting.record, waiting.gone] += 1
                return True
            if waiting.deleted:
                # First said, then done: whoever reads a message of it later knows that it must go.
                await session.publish(messages.deletion(session.stream, waiting.deleted))
                await session.erase(waiting.deleted)
            else:
                message = await self._message(session, waiting)
                await session.publish(message)
                self.shortened += names.WITHOUT in message.headers
        except BrokerTrouble as error:
            self.broker.failed(error)
            if error.reason in ("stream", "timeout"):
                # A stream that is gone is made anew with the next connection; one that is silent may be half open.
                await session.close()
            return False
        except messages.TooLarge as error:
            self.outbox.lost[waiting.record, TOO_LARGE] += 1
            log.error(
                "nats: a %s was not published: %s; raise max_payload of the broker, or max_msg_size of the stream",
                waiting.record,
                error,
            )
            return True
        self.sent[waiting.record] += 1
        return True

    async def _message(self, session: Session, waiting: Waiting) -> messages.Outgoing:
        if waiting.event is not None:
            return messages.finding(session.stream, waiting.event, session.limit)
        assert waiting.trace is not None
        # Some ten milliseconds for a large one.
        return await asyncio.to_thread(messages.trace, session.stream, waiting.trace, session.limit)


class Tombstones:
    """Tells a monitor of requests that were deleted elsewhere: once for each that is or comes into the stream."""

    def __init__(self, broker: Broker, heard: Callable[[list[str]], Awaitable[Any]]) -> None:
        self._broker = broker
        self._heard = heard
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen."""
        self._task = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            await end(self._task)

    async def _listen(self) -> None:
        """All that are there, whenever there is a new connection, then each that comes."""
        while True:
            try:
                session = await self._broker.session()
                async for hashes in session.deletions():
                    await self._heard(hashes)
            except BrokerTrouble as error:
                self._broker.failed(error)
                await asyncio.sleep(PAUSE_SECONDS[0])
            except StoreUnavailable:
                await asyncio.sleep(PAUSE_SECONDS[-1])
            except Exception:
                log.exception("nats: a fault of the monitor; it goes on in ten seconds")
                await asyncio.sleep(PAUSE_SECONDS[-1])
