"""Events on their way to subscribers: a log to resume from, and a bounded queue for each subscriber.

The log holds findings only. Progress events (a request started, a sentence closed) are many and old ones are of no use,
so they go to who asked for them at the time, carry the cursor of the last finding, and are not sent again on resume.
"""

import asyncio
import base64
import binascii
import uuid
from collections import deque
from collections.abc import Callable
from itertools import islice

from stream_monitor.v1alpha1 import monitor_pb2

FINDINGS = frozenset(
    {
        monitor_pb2.EVENT_KIND_ANCHOR_SHIFT,
        monitor_pb2.EVENT_KIND_PROMPT_DETACHMENT,
        monitor_pb2.EVENT_KIND_ANCHOR_LOCK,
        monitor_pb2.EVENT_KIND_UNTRUSTED_ANCHOR,
    }
)

Wanted = Callable[[monitor_pb2.Event], bool]


class CursorGone(Exception):
    """The cursor is of another monitor start, or older than the oldest event held."""


class CursorMalformed(Exception):
    """Not a cursor of ours."""


class TooManySubscribers(Exception):
    """The limit on subscribers is reached."""


class Subscriber:
    """Events waiting for one subscriber, with the cursor to send along; the oldest are lost when it is full."""

    def __init__(self, wanted: Wanted, backlog: list[tuple[int, monitor_pb2.Event]], limit: int) -> None:
        self.wanted = wanted
        self.lost = 0
        self.closed = False
        self._backlog = deque(backlog)
        self._queue: deque[tuple[int, monitor_pb2.Event]] = deque()
        self._limit = limit
        self._woken = asyncio.Event()

    def offer(self, sequence: int, event: monitor_pb2.Event) -> bool:
        """Queue an event; False if that lost the oldest one waiting."""
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

    async def next(self) -> tuple[int, monitor_pb2.Event, int] | None:
        """Sequence, event, and how many were lost before it; None when closed."""
        while not self._backlog and not self._queue:
            if self.closed:
                return None
            self._woken.clear()
            await self._woken.wait()
        sequence, event = self._backlog.popleft() if self._backlog else self._queue.popleft()
        lost, self.lost = (0, self.lost) if self._backlog else (self.lost, 0)
        return sequence, event, lost


class EventLog:
    """The newest findings, numbered from 1 in this monitor start (`epoch`), and who is subscribed."""

    def __init__(self, size: int, queue: int, max_subscribers: int) -> None:
        self.epoch = uuid.uuid4().hex
        self.queue = queue
        self.max_subscribers = max_subscribers
        self.lost = 0
        self.subscribers: set[Subscriber] = set()
        self._newest = 0
        self._held: deque[monitor_pb2.Event] = deque(maxlen=size)

    def publish(self, event: monitor_pb2.Event) -> None:
        """Log a finding and hand the event to every subscriber that wants it."""
        if event.kind in FINDINGS:
            self._newest += 1
            self._held.append(event)
        for subscriber in self.subscribers:
            if subscriber.wanted(event) and not subscriber.offer(self._newest, event):
                self.lost += 1

    def subscribe(self, wanted: Wanted, cursor: str, last: int = 0) -> tuple[Subscriber, str]:
        """A subscriber, fed from `cursor`, or if that is empty from the newest `last` findings it wants on, and the
        cursor it starts at.

        Raises CursorGone, CursorMalformed or TooManySubscribers.
        """
        after = self._resume(cursor) if cursor else self._before_last(wanted, last)
        if len(self.subscribers) >= self.max_subscribers:
            raise TooManySubscribers(f"{self.max_subscribers} subscribers (setting max_subscribers)")
        first = self._newest - len(self._held) + 1
        backlog = [
            (sequence, event)
            for sequence, event in enumerate(islice(self._held, after + 1 - first, None), after + 1)
            if wanted(event)
        ]
        subscriber = Subscriber(wanted, backlog, self.queue)
        self.subscribers.add(subscriber)
        return subscriber, self.cursor(after)

    def cursor(self, sequence: int) -> str:
        """The opaque form of a position in the log."""
        return base64.urlsafe_b64encode(f"{self.epoch}:{sequence}".encode()).decode()

    def _before_last(self, wanted: Wanted, last: int) -> int:
        """The sequence number after which `last` findings are wanted."""
        if not last:
            return self._newest
        numbered = zip(range(self._newest, 0, -1), reversed(self._held), strict=False)
        found = list(islice((sequence for sequence, event in numbered if wanted(event)), last))
        return found[-1] - 1 if found else self._newest

    def _resume(self, cursor: str) -> int:
        try:
            epoch, _, number = base64.urlsafe_b64decode(cursor.encode()).decode("ascii").partition(":")
            after = int(number)
        except (binascii.Error, ValueError):
            raise CursorMalformed("cursor is not one that this service gave out") from None
        oldest = self._newest - len(self._held)
        if epoch != self.epoch or not oldest <= after <= self._newest:
            why = "of another monitor start" if epoch != self.epoch else "older than the oldest event held"
            raise CursorGone(f"cursor is {why}; the oldest cursor held is {self.cursor(oldest)}")
        return after
