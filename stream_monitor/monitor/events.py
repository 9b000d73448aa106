"""Events on their way to subscribers: a log to resume from, and a bounded queue for each subscriber.

The log holds findings only. Progress events (a request started, a sentence closed) are many and old ones are of no use,
so they go to who asked for them at the time, carry the cursor of the last finding, and are not sent again on resume.

With a store, a finding is sent once it is committed, so that its cursor holds over a restart; what comes after it waits
behind it. If that takes longer than `PATIENCE_SECONDS`, events are sent all the same, with cursors of this run alone.
"""

import asyncio
import base64
import binascii
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

from stream_monitor.monitor.database import EventPage
from stream_monitor.v1alpha1 import monitor_pb2

FINDINGS = frozenset(
    {
        monitor_pb2.EVENT_KIND_ANCHOR_SHIFT,
        monitor_pb2.EVENT_KIND_PROMPT_DETACHMENT,
        monitor_pb2.EVENT_KIND_ANCHOR_LOCK,
        monitor_pb2.EVENT_KIND_UNTRUSTED_ANCHOR,
    }
)
PATIENCE_SECONDS = 5.0
"""How long a finding waits for its commit."""

Wanted = Callable[[monitor_pb2.Event], bool]
Waiting = tuple[int, monitor_pb2.Event, int]
"""Sequence, event, and how many events were lost before it."""


class CursorGone(Exception):
    """The cursor holds no longer, or is older than the oldest event held; `oldest` is the oldest cursor held."""

    def __init__(self, why: str, oldest: str) -> None:
        super().__init__(f"cursor is {why}; the oldest cursor held is {oldest}")
        self.oldest = oldest


class CursorMalformed(Exception):
    """Not a cursor of ours."""


class TooManySubscribers(Exception):
    """The limit on subscribers is reached."""


class Shelf(Protocol):
    """Where findings are kept beyond this run."""

    def keep(self, sequence: int, event: monitor_pb2.Event) -> None:
        """Store a finding; `EventLog.committed` is called when it is."""

    async def events_after(self, sequence: int) -> EventPage:
        """The next findings after a sequence. Raises CursorGone."""


class Subscriber:
    """Events waiting for one subscriber, with the cursor to send along; the oldest are lost when it is full.

    One that resumes reads what it missed from the store, page by page, until the log in memory reaches back far enough.
    """

    def __init__(self, log: "EventLog", wanted: Wanted, after: int, limit: int, owner: str, progress: bool) -> None:
        self.wanted = wanted
        self.owner = owner
        self.progress = progress
        self.lost = 0
        self.closed = False
        self._log = log
        self._after = after
        self._live = False
        self._missed = 0  # Lost before whatever is found next.
        self._backlog: deque[Waiting] = deque()
        self._queue: deque[tuple[int, monitor_pb2.Event]] = deque()
        self._limit = limit
        self._woken = asyncio.Event()
        self._go_live()

    def offer(self, sequence: int, event: monitor_pb2.Event) -> bool:
        """Queue an event; False if that lost the oldest one waiting."""
        if not self._live:
            return True  # It will find it in the log.
        if self._log.shared and sequence <= self._after:
            return True  # It has it from another process, which was ahead of this one.
        kept = len(self._queue) < self._limit
        if not kept:
            self._queue.popleft()
            self.lost += 1
        self._queue.append((sequence, event))
        self._woken.set()
        return kept

    @property
    def waiting(self) -> int:
        """Events queued and not yet handed out, those of a resumption left aside."""
        return len(self._queue)

    def close(self) -> None:
        """End the subscription; what waits is still handed out."""
        self.closed = True
        self._woken.set()

    def forget(self, gone: Wanted) -> None:
        """Take back events that wait."""
        self._backlog = deque(entry for entry in self._backlog if not gone(entry[1]))
        self._queue = deque(entry for entry in self._queue if not gone(entry[1]))

    async def next(self) -> Waiting | None:
        """The next event; None when closed. Raises CursorGone if the store lets go what was still to be read."""
        while not self._backlog and not self._queue:
            if not self._live:
                page = await self._log.events_after(self._after)
                self._after = page.last
                self._take(page.events)
                self._missed += page.lost
                self._go_live()
            elif self.closed:
                return None
            else:
                self._woken.clear()
                await self._woken.wait()
        if self._backlog:
            return self._backlog.popleft()
        sequence, event = self._queue.popleft()
        lost, self.lost, self._missed = self.lost + self._missed, 0, 0
        return sequence, event, lost

    def _go_live(self) -> None:
        """Join those that are offered events, if the log in memory has all that came after."""
        if self._after >= self._log.forgotten:
            self._live = True
            self._take([(sequence, event, 0) for sequence, event in self._log.held_after(self._after)])

    def _take(self, found: list[Waiting]) -> None:
        for sequence, event, lost in found:
            self._missed += lost
            if self.wanted(event):
                self._backlog.append((sequence, event, self._missed))
                self._missed = 0


class EventLog:
    """The newest findings, numbered in ascending order, and who is subscribed.

    Attributes:
        forgotten: sequence up to which findings are not in memory (any more).
        shared: sequences are those of a stream that others read too, perhaps further than we have. Cursors of theirs
            hold here.
        lost: events lost to subscribers that read too slowly.
        sent, also_sent: called with each event as it is handed to subscribers.
    """

    def __init__(
        self, size: int, queue: int, max_subscribers: int, max_of_owner: int = 64, shared: bool = False
    ) -> None:
        self.shared = shared
        self.queue = queue
        self.max_subscribers = max_subscribers
        self.max_of_owner = max_of_owner
        self.lost = 0
        self.sent: Callable[[monitor_pb2.Event], None] = lambda event: None
        self.also_sent: Callable[[monitor_pb2.Event], None] = lambda event: None
        self.subscribers: set[Subscriber] = set()
        self.forgotten = 0
        self._run = uuid.uuid4().hex
        self._epoch = self._run
        self._shelf: Shelf | None = None
        self._size = size
        self._held: deque[tuple[int, monitor_pb2.Event]] = deque()
        # Numbers given out, sent to subscribers, committed to the store, and let go by it.
        self._issued = self._sent = self._stored = self._let_go = 0
        self._first = 0  # The number that those of this run come after.
        self._pending: deque[tuple[int, monitor_pb2.Event, bool]] = deque()
        self._pending_since = 0.0
        self._patient = True

    @property
    def oldest(self) -> int:
        """The lowest sequence that a cursor may have."""
        return self._let_go if self._shelf is not None and self._epoch != self._run else self.forgotten

    def stored_in(self, shelf: Shelf, first: int, held: Iterable[tuple[int, monitor_pb2.Event]] = ()) -> None:
        """Keep findings in a store, numbered above `first`, before the first is published.

        `held` are the newest of those that are in it already.
        """
        self._shelf = shelf
        self._held.extend(held)
        self._issued = self._sent = self._first = first
        self.forgotten = self._held[0][0] - 1 if self._held else first

    def restart(self) -> None:
        """The stream that gives out the sequences was replaced by another: what was held and handed out is of the old
        one, and those who are subscribed have to begin anew."""
        for subscriber in list(self.subscribers):
            subscriber.close()
        self._held.clear()
        self._issued = self._sent = self._stored = self._let_go = self.forgotten = 0

    def opened(self, epoch: str, newest: int, let_go: int) -> None:
        """The store is open: the name of its cursors, its newest sequence, and up to which it has let findings go."""
        self._epoch, self._stored, self._let_go = epoch, newest, let_go
        self._patient = True

    @property
    def progress_wanted(self) -> bool:
        """Whether any subscriber may want more than findings."""
        return any(subscriber.progress for subscriber in self.subscribers)

    def publish(self, event: monitor_pb2.Event, quietly: bool = False) -> None:
        """Log a finding and hand the event to every subscriber that wants it.

        `quietly`: to none, as none wanted it; only `sent` is told of it, when its turn comes.
        """
        if event.kind in FINDINGS:
            self._issued += 1
            if self._shelf is not None:
                self._shelf.keep(self._issued, event)
        if self._shelf is None or (not self._pending and event.kind not in FINDINGS):
            self._send(self._issued, event, quietly)
            return
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.append((self._issued, event, quietly))
        if not self._patient:
            self._send_pending(self._issued)

    def append(self, sequence: int, event: monitor_pb2.Event) -> None:
        """Log a finding that the store has already, under a number that was given out elsewhere, and hand it out.

        One that was handed out before is not handed out again.
        """
        if sequence > self._sent:
            self._issued = self._stored = sequence
            self._send(sequence, event, quietly=False)

    def committed(self, sequence: int) -> None:
        """The store has the findings up to this one."""
        self._stored = max(self._stored, sequence)
        self._patient = True
        self._send_pending(sequence)

    def troubled(self) -> None:
        """The store cannot be written, or is too slow: nothing waits for it until it commits again."""
        self._patient = False
        self._send_pending(self._issued)

    def tick(self) -> None:
        """Called a few times a second: a store that is too slow holds nothing up."""
        if self._pending and time.monotonic() - self._pending_since > PATIENCE_SECONDS:
            self.troubled()

    def let_go(self, sequence: int) -> None:
        """The store has removed findings up to this one."""
        self._let_go = max(self._let_go, sequence)

    def forget(self, gone: Wanted) -> int:
        """Remove events from the log and from all queues; how many findings were in the log."""
        kept = deque(entry for entry in self._held if not gone(entry[1]))
        removed, self._held = len(self._held) - len(kept), kept
        self._pending = deque(entry for entry in self._pending if not gone(entry[1]))
        for subscriber in self.subscribers:
            subscriber.forget(gone)
        return removed

    def subscribe(
        self, wanted: Wanted, cursor: str, last: int = 0, owner: str = "", progress: bool = True
    ) -> tuple[Subscriber, str]:
        """A subscriber, fed from `cursor`, or if that is empty from the newest `last` findings it wants on, and the
        cursor it starts at. `owner` is whose it is, where there is more than one to share the room; `progress` says
        whether it may want more than findings.

        Raises CursorGone, CursorMalformed or TooManySubscribers.
        """
        after = self._resume(cursor) if cursor else self._before_last(wanted, last)
        if len(self.subscribers) >= self.max_subscribers:
            raise TooManySubscribers(f"{self.max_subscribers} subscribers (setting max_subscribers)")
        if owner and sum(each.owner == owner for each in self.subscribers) >= self.max_of_owner:
            raise TooManySubscribers(f"{self.max_of_owner} subscribers of {owner} (setting max_principal_subscribers)")
        subscriber = Subscriber(self, wanted, after, self.queue, owner, progress)
        self.subscribers.add(subscriber)
        return subscriber, self.cursor(after)

    def cursor(self, sequence: int) -> str:
        """The opaque form of a position in the log: one of the store's where the store has come as far."""
        epoch = self._epoch if self.shared or sequence <= self._stored else self._run
        return base64.urlsafe_b64encode(f"{epoch}:{sequence}".encode()).decode()

    def held_after(self, sequence: int) -> list[tuple[int, monitor_pb2.Event]]:
        """Findings in memory after a sequence."""
        return [entry for entry in self._held if entry[0] > sequence]

    async def events_after(self, sequence: int) -> EventPage:
        """Findings in the store after a sequence. Raises CursorGone."""
        assert self._shelf is not None
        page = await self._shelf.events_after(sequence)
        if sequence < self.oldest:
            raise self._gone("older than the oldest event held")
        # What is committed and not yet sent will be sent.
        events = [entry for entry in page.events if entry[0] <= self._sent]
        last = min(page.last, self._sent)
        if events or last > sequence:
            return EventPage(events, last)
        # Neither the store nor the memory has what comes next.
        return EventPage([], self.forgotten, max(0, self.forgotten - max(sequence, self._first)))

    def _send(self, sequence: int, event: monitor_pb2.Event, quietly: bool) -> None:
        self._sent = sequence
        self.sent(event)
        self.also_sent(event)
        if quietly:
            return
        if event.kind in FINDINGS:
            self._held.append((sequence, event))
            if len(self._held) > self._size:
                self.forgotten = self._held.popleft()[0]
        for subscriber in self.subscribers:
            if subscriber.wanted(event) and not subscriber.offer(sequence, event):
                self.lost += 1

    def _send_pending(self, sequence: int) -> None:
        while self._pending and self._pending[0][0] <= sequence:
            self._send(*self._pending.popleft())
        self._pending_since = time.monotonic()

    def _before_last(self, wanted: Wanted, last: int) -> int:
        """The sequence number after which `last` findings are wanted, as far as the memory reaches."""
        found = list(islice((sequence for sequence, event in reversed(self._held) if wanted(event)), last))
        return found[-1] - 1 if found else self._sent

    def _resume(self, cursor: str) -> int:
        try:
            epoch, _, number = base64.urlsafe_b64decode(cursor.encode()).decode("ascii").partition(":")
            after = int(number)
        except (binascii.Error, ValueError):
            raise CursorMalformed("cursor is not one that this service gave out") from None
        if epoch not in (self._epoch, self._run):
            raise self._gone("of another monitor start or store")
        if after < self.oldest or (after > self._sent and not self.shared):
            raise self._gone("older than the oldest event held")
        return after

    def _gone(self, why: str) -> CursorGone:
        return CursorGone(why, self.cursor(self.oldest))
