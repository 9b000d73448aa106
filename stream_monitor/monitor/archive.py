"""The store as the event loop sees it: what is handed over to be written, and what is read back.

The loop never waits for the disk. A recorder thread writes (recorder.py), another thread reads. Without a store, or
while it cannot be opened, nothing is found in it.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prometheus_client import Histogram

from stream_monitor.monitor import recovery, views
from stream_monitor.monitor.access.rights import Visible
from stream_monitor.monitor.database import Database, EventPage, Listed, StoredEvent, StoredTrace
from stream_monitor.monitor.erasure import ErasureUnfinished, erase
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.head_views import clear_heads
from stream_monitor.monitor.identity import TraceKey
from stream_monitor.monitor.recorder import Recorder
from stream_monitor.monitor.retention import Clock, Removed, housekeep, let_go_some
from stream_monitor.monitor.store import TraceStore
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.v1alpha1 import monitor_pb2

SAVE_SECONDS = 0.2
"""How often traces that are due are handed to the recorder."""
FINDING_SECONDS = 10.0
"""After which a running trace is stored for a finding: to make a trace ready takes time that grows with it, and more
findings follow, or its end."""
RETENTION_SECONDS = 60.0
PAGE = 500
"""Findings read at a time for a subscriber that resumes."""
ERASE_SECONDS = 30.0
"""How long a deletion may take; beyond it, it goes on by itself."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class StoreUnavailable(Exception):
    """The store cannot be read or written now; one line."""


class _Change(NamedTuple):
    """A trace to be stored, and when, by the clock that does not jump."""

    trace: RequestTrace
    due: float


class Archive:
    """Findings and traces in the store.

    Attributes:
        recorder: the thread that writes; None without a store.
        removed: rows that retention and deletions removed, by record and reason.
        bytes: in use in the file, as of the last look. max_bytes: how many may be.
        prepare: makes the store ready for more than a monitor needs, on the recorder's thread, whenever it is opened.
        stored: told that findings were committed.
        unstored: takes closed traces where there is no store.
    """

    def __init__(self, events: EventLog, traces: TraceStore, graveyard: Graveyard) -> None:
        self.recorder: Recorder | None = None
        self.removed = Removed()
        self.bytes = self.max_bytes = 0
        self._clock = Clock()
        self.prepare: Callable[[Database], None] = lambda _: None
        self.stored: Callable[[], None] = lambda: None
        self.unstored: Callable[[StoredTrace], None] | None = None
        self._events = events
        self._traces = traces
        self._graveyard = graveyard
        self._changed: dict[TraceKey, _Change] = {}
        self._reader: Database | None = None
        self._reading = ThreadPoolExecutor(1, "stream-monitor-store-reader")
        self._tasks: list[asyncio.Task[None]] = []
        self._newest = self._serial = 0
        self._recent: list[tuple[int, monitor_pb2.Event]] = []

    async def open(self, path: Path, max_age_seconds: float, max_bytes: int, commits: Histogram) -> None:
        """Open the store, before anything is published. Raises StoreRefused; other failures are tried again later."""
        self._loop = asyncio.get_running_loop()
        self._max_age_ns, self.max_bytes = int(max_age_seconds * 1e9), max_bytes
        recorder = Recorder(path, self, self._graveyard, commits)
        await asyncio.to_thread(recorder.open)
        # Not before: one whose store was refused never answers.
        self.recorder = recorder
        await asyncio.sleep(0)  # `_take_over` has run.
        if self._reader is None:
            # The file may turn out to hold findings and traces when it can be opened: number new ones above them.
            self._newest = self._serial = time.time_ns() // 1000
        self._events.stored_in(self, self._newest, self._recent)
        self._traces.serial = self._serial
        self._traces.evicting = self._evicting
        self.recorder.start()
        self._tasks = [asyncio.create_task(self._save()), asyncio.create_task(self._retain())]

    async def settle(self) -> None:
        """Nothing more comes: store what is known, the state of requests that still run included."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.recorder is not None:
            for trace in self._traces.newest_first():
                if not trace.finished or (trace.instance, trace.request_id) in self._changed:
                    self.recorder.put_trace(_stored(trace, going=True))
            if not self.recorder.trouble:
                await asyncio.wait({asyncio.ensure_future(self.write(lambda _: None))}, timeout=ERASE_SECONDS)

    async def close(self) -> None:
        """Close the store, after `settle`."""
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.stop)
            await asyncio.sleep(0)  # What it told last has been heard.
        if self._reader is not None:
            await self._in_reader(Database.close, self._reader)
            self._reader = None
        self._reading.shutdown()

    # What the recorder's thread tells.

    def opened(self, database: Database) -> None:
        """The store is open; see `Outcomes`."""
        self.prepare(database)
        reader = Database(database.path)
        numbers = (database.meta("newest"), database.meta("forgotten"), database.newest_serial())
        self._recent = database.newest_events(PAGE)
        self._post(self._take_over, reader, numbers, database.tombstones())

    def committed(self, sequence: int) -> None:
        """Findings are in the store; see `Outcomes`."""
        self._post(self._events.committed, sequence)
        self._post(self.stored)

    def troubled(self) -> None:
        """The store cannot be written; see `Outcomes`."""
        self._post(self._events.troubled)

    # Writing.

    def keep(self, sequence: int, event: monitor_pb2.Event) -> None:
        """Store a finding; see `Shelf`."""
        assert self.recorder is not None
        key = event.key
        self.recorder.add_event(
            StoredEvent(sequence, key.engine_instance, key.request_id, event.SerializeToString(deterministic=True))
        )

    def mark(self, trace: RequestTrace) -> None:
        """Store a trace: within `SAVE_SECONDS` as it began or ended, or `FINDING_SECONDS` after the first finding since
        it was stored."""
        if self.recorder is not None:
            key = (trace.instance, trace.request_id)
            waits = trace.stored and not trace.finished
            due = time.monotonic() + FINDING_SECONDS if waits else 0.0
            held = self._changed.get(key)
            self._changed[key] = _Change(trace, min(held.due, due) if held and held.trace is trace else due)
        elif self.unstored is not None and trace.finished:
            self.unstored(_stored(trace, going=False))

    async def erase(self, keys: list[TraceKey], until_ns: int) -> None:
        """Remove requests from the store for good. Raises StoreUnavailable."""
        for key in keys:
            self._changed.pop(key, None)
        if self.recorder is None:
            return
        erasing = asyncio.ensure_future(self.write(lambda database: erase(database, keys, until_ns)))
        seconds = 0.0 if self.recorder.trouble else ERASE_SECONDS
        done, _ = await asyncio.wait({erasing}, timeout=seconds)
        if not done:
            raise StoreUnavailable(f"the store cannot be written now ({self.recorder.trouble or 'it is busy'})")
        try:
            self.removed += erasing.result()
        except ErasureUnfinished:
            raise StoreUnavailable("another process reads the store, whose write-ahead log still holds it") from None

    # Reading.

    async def events_after(self, sequence: int) -> EventPage:
        """The next findings; see `Shelf`. Raises StoreUnavailable."""
        nothing = EventPage([], sequence)
        page = await self.read(lambda database: database.events_after(sequence, PAGE), nothing)
        held = [entry for entry in page.events if not self.is_buried(entry[1].key)]
        return EventPage(held, page.last, page.lost)

    async def find(self, request_id: str, visible: Visible, buried: bool = False) -> list[tuple[TraceKey, int]]:
        """Requests an id may mean, newest first, and how well it fits. Raises StoreUnavailable.

        Requests of tenants that are not `visible` do not exist.
        `buried` asks, to delete, for those too that were deleted while the store could not be written, and are still in
        it; one that is not open yet may hold any, so that nothing found would be no answer.
        """
        if buried and self.recorder is not None and self._reader is None:
            raise StoreUnavailable(f"the store is not open yet ({self.recorder.trouble})")
        nothing: list[tuple[TraceKey, int, str]] = []
        found = await self.read(lambda database: database.find(request_id), nothing)
        return [(key, fit) for key, fit, tenant in found if visible(tenant) and (buried or key not in self._graveyard)]

    async def infos(
        self, before: int, limit: int, model_name: str, engine: str, request_id: str, fit: int
    ) -> list[Listed]:
        """Requests below a serial, newest first. Raises StoreUnavailable."""
        return await self.read(lambda database: database.infos(before, limit, model_name, engine, request_id, fit), [])

    def is_buried(self, key: monitor_pb2.TraceKey) -> bool:
        """Whether a request was deleted; the store may not know it yet."""
        return (key.engine_instance, key.request_id) in self._graveyard

    async def trace(self, key: TraceKey, with_heads: bool) -> monitor_pb2.GetTraceResponse | None:
        """A whole trace. Raises StoreUnavailable."""
        trace = await self.read(lambda database: database.trace(key), None)
        if trace is not None and not with_heads:
            clear_heads(trace)
        return trace

    async def read(self, work: Callable[[Database], T], nothing: T) -> T:
        """Have something read; `nothing` where there is no store. Raises StoreUnavailable."""
        reader = self._reader
        if reader is None:
            return nothing
        try:
            return await self._in_reader(work, reader)
        except sqlite3.Error as error:
            if recovery.is_corrupt(error) and self.recorder is not None:
                self.recorder.call(Database.check)
            raise StoreUnavailable(f"the store cannot be read now ({recovery.reason(error)})") from None

    async def _in_reader(self, work: Callable[[Database], T], database: Database) -> T:
        return await self._loop.run_in_executor(self._reading, work, database)

    # On the event loop.

    def _post(self, work: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # The loop was closed.
            self._loop.call_soon_threadsafe(work, *arguments)

    def _take_over(self, reader: Database, numbers: tuple[int, int, int], tombstones: dict[bytes, int]) -> None:
        """The store is open: for the first time, or a new one in the place of a damaged one."""
        before, self._reader = self._reader, reader
        self._newest, forgotten, self._serial = numbers
        self._events.opened(reader.epoch, self._newest, forgotten)
        buried = self._graveyard.load(reader.keys, tombstones)
        if before is not None:
            self._reading.submit(before.close)
            assert self.recorder is not None
            self.recorder.call(lambda database: database.bury(buried))
            for trace in self._traces.newest_first():
                trace.stored = False
                self.mark(trace)

    async def _save(self) -> None:
        """Hand over traces that are due, one a turn of the loop."""
        assert self.recorder is not None
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            now = time.monotonic()
            for key in [key for key, change in self._changed.items() if change.due <= now]:
                # It may have been deleted, or stored as it left the memory, meanwhile.
                change = self._changed.pop(key, None)
                if change is not None and self._traces.get(*key) is change.trace:
                    try:
                        self.recorder.put_trace(_stored(change.trace, going=False))
                        change.trace.stored = True
                    except Exception:
                        self.recorder.lost["trace", "error"] += 1
                        log.exception("store: a trace was not stored")
                    await asyncio.sleep(0)

    def _evicting(self, trace: RequestTrace) -> None:
        """A trace leaves the memory; what is not stored of it is handed over now."""
        changed = self._changed.pop((trace.instance, trace.request_id), None)
        if self.recorder is not None and (changed or not trace.finished):
            self.recorder.put_trace(_stored(trace, going=True))

    async def _retain(self) -> None:
        """At start and once a minute: let go what is too old or too much."""
        while True:
            try:
                await self._let_go(self._clock.now_ns())
            except Exception:
                log.exception("store: retention failed; it is tried again in a minute")
            await asyncio.sleep(RETENTION_SECONDS)

    async def _let_go(self, now: int) -> None:
        before = now - self._max_age_ns
        while True:
            removed, forgotten, self.bytes = await self.write(
                lambda database: (
                    let_go_some(database, before, self.max_bytes),
                    database.meta("forgotten"),
                    database.used_bytes,
                )
            )
            self.removed += removed
            self._events.let_go(forgotten)
            if not removed:
                break
        await self.write(lambda database: housekeep(database, before, now))
        self._graveyard.expire(now)

    async def write(self, work: Callable[[Database], T]) -> T:
        """Have something written, after all that was handed over before; waits until the store can be written."""
        assert self.recorder is not None
        return await asyncio.shield(asyncio.wrap_future(self.recorder.call(work)))


def _stored(trace: RequestTrace, going: bool) -> StoredTrace:
    """A trace as the store has it: whole when it ended or has findings, else what is known at its start.

    `going` says that the monitor will not see more of it.
    """
    if trace.finished or trace.findings or going:
        whole = views.full(trace, with_heads=True)
        info = monitor_pb2.RequestInfo()
        info.CopyFrom(whole.info)
        whole.ClearField("info")
    else:
        whole, info = monitor_pb2.GetTraceResponse(), views.info(trace)
    state = monitor_pb2.REQUEST_STATE_CUT if going and not trace.finished else info.state
    return StoredTrace(
        trace.instance,
        trace.request_id,
        trace.serial,
        state,
        info.model_name,
        info.engine,
        info.SerializeToString(deterministic=True),
        whole.SerializeToString(deterministic=True),
    )
