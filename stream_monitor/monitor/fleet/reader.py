"""From the stream into the store of one process of the fleet, and from there to its subscribers, in order.

Where to go on is written in the transaction that keeps what was read, so that neither a kill here nor one of the broker
loses a message or takes one twice. Only then is it acknowledged.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import Histogram

from stream_monitor.monitor.access.rights import everyones
from stream_monitor.monitor.archive import Archive, StoreUnavailable
from stream_monitor.monitor.database import Database
from stream_monitor.monitor.database_file import PUBLIC, StoreRefused
from stream_monitor.monitor.deletion import Deletion, DeletionUnfinished
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.fleet import messages, names, shelf
from stream_monitor.monitor.fleet.broker import Broker, BrokerTrouble, Session
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.identity import TraceKey

BATCH = 32
"""Messages read at a time; each may be as large as the broker takes."""
WAIT_SECONDS = 1.0
STATE_SECONDS = 10.0
"""How often to ask what the stream has let go."""
FOREVER_SECONDS, NO_LIMIT_BYTES = 36_500 * 86_400.0, 1 << 62
"""The stream's limits are the store's: it has none of its own."""
PAUSE_SECONDS, FAULT_SECONDS = 1.0, 10.0

log = logging.getLogger(__name__)
Read = tuple[int, messages.Incoming | None]
"""Sequence, and what was read under it; None if it was malformed."""


class Reader:
    """Attributes:
    read: messages, by record and outcome (shelf.OUTCOMES).
    expired: messages, at most, that the stream let go before they were read here.
    position: sequence up to which the stream was read.
    lag: messages of the stream that are not read yet, as of the last that was.
    held: what the store holds, by record.
    """

    def __init__(
        self,
        broker: Broker,
        path: Path,
        durable: str,
        archive: Archive,
        events: EventLog,
        graveyard: Graveyard,
        deletion: Deletion,
        commits: Histogram,
        ready: Callable[[bool], Any],
    ) -> None:
        self.read: Counter[tuple[str, str]] = Counter()
        self.expired = self.position = self.lag = 0
        self.held: Counter[str] = Counter()
        self._broker = broker
        self._path = path
        self._durable = durable
        self._archive = archive
        self._events = events
        self._graveyard = graveyard
        self._deletion = deletion
        self._commits = commits
        self._tell_ready = ready
        self._epoch = ""

    async def run(self) -> None:
        """Read for good. Raises StoreRefused."""
        while True:
            try:
                session = await self._broker.session()
                await self._open(session)
                await self._follow(session)
            except BrokerTrouble as error:
                self._broker.failed(error)
                if error.reason != "unreachable" and self._broker.current is not None:
                    await self._broker.current.close()
            except shelf.OutOfStep:
                # The store was damaged, and the new one is empty.
                await self._tell_ready(False)
                for subscriber in list(self._events.subscribers):
                    subscriber.close()
            except (StoreUnavailable, DeletionUnfinished) as error:
                log.error("fleet: %s", error)
                await asyncio.sleep(PAUSE_SECONDS)
            except StoreRefused:
                raise
            except Exception:
                log.exception("fleet: a fault of this process; it reads on in ten seconds")
                await asyncio.sleep(FAULT_SECONDS)

    async def _open(self, session: Session) -> None:
        """Have the store be that of this stream."""
        before, self._epoch = self._epoch, session.epoch
        self._archive.prepare = lambda database: shelf.adopt(database, self._epoch)
        if self._archive.recorder is None:
            await self._archive.open(self._path, FOREVER_SECONDS, NO_LIMIT_BYTES, self._commits)
        elif before != session.epoch:
            log.warning("fleet: the stream was replaced by another one of its name")
            await self._tell_ready(False)
            self._events.restart()
            await self._archive.write(lambda database: shelf.adopt(database, self._epoch))
            self._events.opened(self._epoch, 0, 0)
        until = time.time_ns() + self._remembered_ns(session)
        known: dict[bytes, int] = {}
        for hashed in await self._archive.read(Database.tombstones, known):
            # Those of requests that this process never held stand under their public hash.
            self._graveyard.bury_hashed(hashed, until)

    async def _follow(self, session: Session) -> None:
        self.position = await self._archive.write(lambda database: database.meta("position"))
        first, newest = await self._look(session)
        looked = time.monotonic()
        consumer = await session.consume(self._durable, self.position)
        while not session.closed.is_set():
            fetched = await consumer.next(BATCH, WAIT_SECONDS)
            self.lag = consumer.pending
            if fetched:
                await self._take(session, await asyncio.to_thread(_decoded, session.stream, fetched))
                await consumer.done(fetched[-1])
            if not self.lag and not session.closed.is_set():
                self._broker.worked()
                await self._tell_ready(True)
            if time.monotonic() - looked > STATE_SECONDS and (self.position >= newest or not self.lag):
                # What was deleted is also gone from the stream. It was said there before, so that has been read.
                await self._let_go(first)
                first, newest = await self._look(session)
                looked = time.monotonic()

    async def _take(self, session: Session, found: list[Read]) -> None:
        entries: list[shelf.Entry] = []
        for sequence, incoming in found:
            if incoming is None:
                self.read["other", shelf.MALFORMED] += 1
            elif incoming.deleted:
                await self._keep(session, entries, sequence - 1)
                entries = []
                await self._bury(session, incoming.deleted, sequence)
            else:
                message = incoming.event if incoming.event is not None else incoming.trace
                assert message is not None
                entries.append(shelf.Entry(sequence, message))
        await self._keep(session, entries, found[-1][0])

    async def _keep(self, session: Session, entries: Sequence[shelf.Entry], last: int) -> None:
        after = self.position
        if last <= after:
            return
        now = time.time_ns()
        begun = time.monotonic()
        taken = await self._archive.write(
            lambda database: shelf.take(database, entries, after, last, self._graveyard, now)
        )
        self._commits.observe(time.monotonic() - begun)
        self.position = last
        self.read.update(taken.outcomes)
        for sequence, event in taken.findings:
            # It may have been deleted since.
            if (event.key.engine_instance, event.key.request_id) not in self._graveyard:
                self._events.append(sequence, event)
        for sequence in taken.unwanted:
            # So that a process which comes to know the stream later finds each finding once, and nothing deleted.
            await session.erase_one(sequence)

    async def _bury(self, session: Session, request: str, sequence: int) -> None:
        """A request was deleted: here, too, before the message that says so counts as read."""
        until = time.time_ns() + self._remembered_ns(session)
        self._graveyard.bury_hashed(bytes.fromhex(request), until)
        if keys := [key for key, _ in await self._archive.find(request, everyones, buried=True)]:
            await self._deletion.delete(keys, "another process", everywhere=False)
        after = self.position
        await self._archive.write(lambda database: shelf.bury(database, request, after, sequence, until))
        self.position = sequence
        self.read[names.DELETED, shelf.READ] += 1

    async def _look(self, session: Session) -> tuple[int, int]:
        """The first and the newest sequence of the stream."""
        state = await session.state()
        first = state.first_seq
        if first - 1 > self.position:
            self.expired += first - 1 - self.position if self.position else 0
            await self._archive.write(lambda database: shelf.miss(database, first))
            self._events.let_go(first - 1)
        return first, state.last_seq

    async def _let_go(self, first: int) -> None:
        """What the stream has let go is let go here."""
        while await self._archive.write(lambda database: shelf.let_go(database, first)):
            pass
        self._events.let_go(await self._archive.write(lambda database: database.meta("forgotten")))
        self.held = await self._archive.read(shelf.counts, self.held)

    @staticmethod
    def _remembered_ns(session: Session) -> int:
        """For how long messages of a deleted request may come: as long as the stream may hold what tells of it."""
        return int((session.days or 36_500) * 86_400e9)


def _decoded(stream: str, fetched: Sequence[Any]) -> list[Read]:
    found: list[Read] = []
    for message in fetched:
        sequence = message.metadata.sequence.stream
        try:
            found.append((sequence, messages.read(stream, message.subject, message.headers, message.data)))
        except messages.Malformed as error:
            log.error("fleet: message %d on %s is malformed: %s", sequence, message.subject, error)
            found.append((sequence, None))
    return found


class FleetDeletion:
    """`DeleteRequest` on a process of the fleet: first the stream, which tells all others, then this process."""

    def __init__(self, broker: Broker, here: Deletion) -> None:
        self._broker = broker
        self._here = here

    async def delete(self, keys: Sequence[TraceKey], who: str) -> None:
        """Remove requests everywhere. Raises DeletionUnfinished."""
        session = self._broker.current
        if session is None:
            raise DeletionUnfinished(
                f"nothing was deleted: {self._broker.address} cannot be reached ({self._broker.trouble}); ask again"
            )
        try:
            for key in keys:
                request = PUBLIC.trace(*key).hex()
                await session.publish(messages.deletion(session.stream, request))
                await session.erase(request)
        except BrokerTrouble as error:
            self._broker.failed(error)
            raise DeletionUnfinished(f"not everything was deleted from the stream: {error}; ask again") from None
        await self._here.delete(keys, who, everywhere=False)
