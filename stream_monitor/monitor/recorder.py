"""The thread that writes to the store: what the event loop hands over is committed in batches.

While the store cannot be written, what was handed over waits, bounded, the oldest making room; writing is tried again
until it works. A damaged file is set aside and a new one begun.
"""

import logging
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prometheus_client import Histogram

from stream_monitor.monitor import recovery
from stream_monitor.monitor.database import Database, StoredEvent, StoredTrace
from stream_monitor.monitor.database_file import StoreRefused
from stream_monitor.monitor.identity import TraceKey

BATCH_SECONDS = 0.05
"""What arrives in this time is committed together."""
BATCH_EVENTS, BATCH_BYTES = 1000, 8 << 20
"""Most findings and about most bytes of traces in one commit."""
MAX_EVENTS, MAX_BYTES = 65_536, 64 << 20
"""Findings, and bytes of traces, that may wait."""
RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0)

log = logging.getLogger(__name__)
T = TypeVar("T")
Work = Callable[[Database], T]


class Outcomes(Protocol):
    """Who is told, on the recorder's thread."""

    def opened(self, database: Database) -> None:
        """The store is open, for the first time or anew; nothing has been written yet."""

    def committed(self, sequence: int) -> None:
        """Findings up to this one are in the store, but for those counted as lost."""

    def troubled(self) -> None:
        """The store cannot be written for now."""


class Recorder(threading.Thread):
    """Attributes:
    trouble: why the store cannot be written now; empty when it can.
    written: rows, by record (`trace`, `event`).
    lost: what found no room in the queue, by record and reason.
    set_aside: damaged files so far.
    """

    def __init__(self, path: Path, outcomes: Outcomes, buried: Container[TraceKey], commits: Histogram | None) -> None:
        super().__init__(name="stream-monitor-store", daemon=True)
        self.path = path
        self.trouble = ""
        self.written: Counter[str] = Counter()
        self.lost: Counter[tuple[str, str]] = Counter()
        self.set_aside = 0
        self._outcomes = outcomes
        self._buried = buried
        self._commits = commits
        self._database: Database | None = None
        self._events: deque[StoredEvent] = deque()
        self._traces: dict[TraceKey, StoredTrace] = {}
        self._trace_bytes = 0
        self._calls: deque[tuple[Work[Any], Future[Any]]] = deque()
        self._missing = 0
        self._newest = 0
        self._salt: bytes | None = None
        self._lock: recovery.Lock | None = None
        self._failures = 0
        self._stopping = False
        self._changed = threading.Condition()

    # From the event loop.

    def add_event(self, event: StoredEvent) -> None:
        """Hand over a finding, in ascending sequence."""
        with self._changed:
            self._events.append(event)
            self._make_room()
            self._changed.notify()

    def put_trace(self, trace: StoredTrace) -> None:
        """Hand over what is known of a request; replaces what still waits of it."""
        key = (trace.instance, trace.request_id)
        with self._changed:
            held = self._traces.pop(key, None)
            self._traces[key] = trace
            self._trace_bytes += trace.size - (held.size if held else 0)
            self._make_room()
            self._changed.notify()

    def call(self, work: Work[T]) -> "Future[T]":
        """Have work done with the connection that writes, after what was handed over before."""
        future: Future[T] = Future()
        with self._changed:
            self._calls.append((work, future))
            self._changed.notify()
        return future

    def waiting(self) -> dict[str, int]:
        """What waits to be written, by record."""
        return {"event": len(self._events), "trace": len(self._traces)}

    def stop(self) -> None:
        """Write what waits, once, and end. Blocks."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self.is_alive():
            self.join()
        if self._events or self._traces:
            log.error(
                "store: %s: %d findings and %d traces were not stored (%s)",
                self.path,
                len(self._events),
                len(self._traces),
                self.trouble,
            )

    # On the thread.

    def open(self) -> None:
        """Open the store, before the thread starts. Raises StoreRefused; other failures are tried again later."""
        try:
            self._open()
        except (OSError, sqlite3.Error) as error:
            self._fail(error)
        except StoreRefused:
            if self._lock is not None:
                self._lock.release()
            raise

    def run(self) -> None:
        """Write until stopped."""
        while True:
            with self._changed:
                if self.trouble:
                    self._changed.wait_for(lambda: self._stopping, self._pause())
                else:
                    self._changed.wait_for(lambda: self._stopping or self._has_more())
                    self._changed.wait_for(lambda: self._stopping, BATCH_SECONDS)
                stopping = self._stopping
            working = self._work()
            if stopping and not (working and self._has_more()):
                break
        if self._database is not None:
            self._database.close()
        if self._lock is not None:
            self._lock.release()

    def _pause(self) -> float:
        return RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS)) - 1]

    def _has_more(self) -> bool:
        return bool(self._events or self._traces or self._calls)

    def _work(self) -> bool:
        """One batch and the calls that wait behind it; False if the store cannot be written."""
        try:
            if self._database is None:
                self._open()
            assert self._database is not None
            self._write_batch(self._database)
            if not (self._events or self._traces):
                self._run_calls(self._database)
        except Exception as error:  # A fault of ours too: a thread that ended in silence would look like an idle one.
            self._fail(error)
            return False
        if self.trouble:
            log.warning("store: %s can be written again", self.path)
            self.trouble, self._failures = "", 0
            self._outcomes.committed(self._newest)
        return True

    def _open(self) -> None:
        if self._lock is None:
            self._lock = recovery.Lock(self.path)
        database, aside = recovery.open_store(self.path, self._salt)
        if aside is not None:
            self._tell_aside(aside)
        try:
            with database.transaction():
                database.cut_running()
                if self._newest > database.meta("newest"):
                    # A new file in the place of a damaged one: what was in that is gone.
                    for name in ("newest", "forgotten"):
                        database.set_meta(name, self._newest)
        except BaseException:
            database.close()
            raise
        self._database, self._newest, self._salt = database, database.meta("newest"), database.keys.salt
        try:
            self._outcomes.opened(database)
        except BaseException:
            # It is opened as a whole, or again.
            self._database = None
            database.close()
            raise

    def _write_batch(self, database: Database) -> None:
        with self._changed:
            events = [self._events.popleft() for _ in range(min(BATCH_EVENTS, len(self._events)))]
            traces: list[StoredTrace] = []
            size = 0
            while self._traces and size < BATCH_BYTES:
                trace = self._traces.pop(next(iter(self._traces)))
                size += trace.size
                traces.append(trace)
            self._trace_bytes -= size
            missing = self._missing
        if not events and not traces:
            if self.trouble:
                with database.transaction():  # Whether it can be written again.
                    database.set_meta("newest", database.meta("newest"))
            return
        try:
            if events and traces and not self.trouble:
                # Findings are waited for, and traces take longer: ahead of them, in a commit of their own. In trouble
                # all is tried at once, so that findings are lost, if any, in one row.
                self._commit(database, events, [], missing)
                events = []
            self._commit(database, events, traces, missing)
        except Exception:
            self._put_back(events, traces)
            raise

    def _commit(self, database: Database, events: list[StoredEvent], traces: list[StoredTrace], missing: int) -> None:
        """One transaction; before the first of the events so many are missing."""
        begun, now = time.monotonic(), time.time_ns()
        with database.transaction():
            if events and missing:
                database.add_loss(events[0].sequence, missing)
            database.add_events(filter(self._wanted, events), now)
            if events:
                # Also of those that were deleted since: their numbers were given out.
                database.set_meta("newest", events[-1].sequence)
            database.put_traces(filter(self._wanted, traces), now)
        if self._commits is not None:
            self._commits.observe(time.monotonic() - begun)
        self.written["event"] += len(events)
        self.written["trace"] += len(traces)
        if events:
            self._newest = events[-1].sequence
            with self._changed:
                self._missing -= missing
            self._outcomes.committed(self._newest)

    def _wanted(self, record: StoredEvent | StoredTrace) -> bool:
        """Whether its request was not deleted since."""
        return (record.instance, record.request_id) not in self._buried

    def _run_calls(self, database: Database) -> None:
        while self._calls:
            work, future = self._calls[0]
            try:
                result = work(database)
            except (OSError, sqlite3.Error):
                raise  # It waits until the store can be written.
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            with self._changed:
                self._calls.popleft()

    def _put_back(self, events: list[StoredEvent], traces: list[StoredTrace]) -> None:
        with self._changed:
            self._events.extendleft(reversed(events))
            newer = self._traces
            self._traces = {(trace.instance, trace.request_id): trace for trace in traces} | newer
            self._trace_bytes = sum(trace.size for trace in self._traces.values())
            self._make_room()

    def _make_room(self) -> None:
        """Counts what has to go. The lock is held."""
        why = self.trouble or "queue_full"
        while len(self._events) > MAX_EVENTS:
            self._events.popleft()
            self._missing += 1
            self.lost["event", why] += 1
        while self._trace_bytes > MAX_BYTES and len(self._traces) > 1:
            self._trace_bytes -= self._traces.pop(next(iter(self._traces))).size
            self.lost["trace", why] += 1

    def _fail(self, error: Exception) -> None:
        why = recovery.reason(error)
        if why == "corrupt" and self._database is not None:
            self._database.close()
            self._database = None
            self._tell_aside(recovery.set_aside(self.path))
            self._outcomes.troubled()
            return
        self._failures += 1
        if why != self.trouble:
            log.error(
                "store: %s cannot be written (%s: %s); events and traces stay in memory, and it is tried again",
                self.path,
                why,
                error,
            )
        self.trouble = why
        self._outcomes.troubled()

    def _tell_aside(self, aside: Path) -> None:
        self.set_aside += 1
        log.error(
            "store: %s is damaged; it was set aside as %s and a new one begun. Cursors given out before do not hold "
            "any more",
            self.path,
            aside,
        )
