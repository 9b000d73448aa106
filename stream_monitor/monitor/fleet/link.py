"""What joins one monitor to a fleet: its outbox, the sender that empties it, and deletions that come from others."""

import time
from collections.abc import Sequence
from contextlib import suppress

from stream_monitor.config import MonitorSettings
from stream_monitor.monitor.access.rights import everyones
from stream_monitor.monitor.archive import Archive
from stream_monitor.monitor.deletion import Deletion, DeletionUnfinished
from stream_monitor.monitor.events import FINDINGS, EventLog
from stream_monitor.monitor.fleet import names, outbox
from stream_monitor.monitor.fleet.broker import Broker
from stream_monitor.monitor.fleet.sender import Sender, Tombstones
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.identity import TraceKey
from stream_monitor.monitor.store import TraceStore
from stream_monitor.v1alpha1 import monitor_pb2

ELSEWHERE = "another process of the fleet"


class Link:
    """Made before the store is opened. Raises SettingsError."""

    def __init__(
        self,
        settings: MonitorSettings,
        archive: Archive,
        log: EventLog,
        traces: TraceStore,
        graveyard: Graveyard,
        deletion: Deletion,
    ) -> None:
        self._archive = archive
        self._traces = traces
        self._graveyard = graveyard
        self._deletion = deletion
        self._remembered_ns = int(max(settings.nats_days, settings.store_days) * 86_400e9)
        broker = Broker(settings, settings.insecure, "stream-monitor")
        self.outbox: outbox.StoredOutbox | outbox.MemoryOutbox
        if settings.store:
            self.outbox = outbox.StoredOutbox(archive)
            archive.prepare = outbox.begin
        else:
            self.outbox = memory = outbox.MemoryOutbox()
            archive.unstored = memory.put_trace
            log.also_sent = lambda event: memory.add_event(event) if event.kind in FINDINGS else None
        self.sender = Sender(broker, self.outbox)
        archive.stored = self.sender.wake
        deletion.beyond = self._delete
        self._tombstones = Tombstones(broker, self._heard)
        self._unfinished: set[str] = set()

    def start(self) -> None:
        """Begin, once the store is open."""
        self.sender.start()
        self._tombstones.start()

    async def stop(self, seconds: float) -> None:
        """Publish what still waits, if it takes no longer than this, and end. The store is still open."""
        await self._tombstones.stop()
        await self.sender.stop(seconds)

    async def _delete(self, keys: Sequence[TraceKey]) -> None:
        """The monitor was asked to delete requests. Raises DeletionUnfinished."""
        if isinstance(self.outbox, outbox.MemoryOutbox):
            self.outbox.forget(keys)
        await self.sender.delete(_hash(*key) for key in keys)

    async def _heard(self, hashes: list[str]) -> None:
        """Others deleted requests. Raises StoreUnavailable."""
        until = time.time_ns() + self._remembered_ns
        new = {each for each in hashes if self._graveyard.bury_hashed(bytes.fromhex(each), until)}
        # They are told again after a failure, and are no news then.
        new |= self._unfinished.intersection(hashes)
        self._unfinished |= new
        held = {
            (trace.instance, trace.request_id)
            for trace in self._traces.newest_first()
            if _hash(trace.instance, trace.request_id) in new
        }
        await self._remove(held)
        stored = {key for each in new for key, _ in await self._archive.find(each, everyones, buried=True)}
        await self._remove(stored - held)
        self._unfinished -= new

    async def _remove(self, keys: set[TraceKey]) -> None:
        if keys:
            # What the store cannot do yet waits there, and a monitor that is started meanwhile is told again.
            with suppress(DeletionUnfinished):
                await self._deletion.delete(list(keys), ELSEWHERE, everywhere=False)


def _hash(instance: str, request_id: str) -> str:
    return names.request_hash(monitor_pb2.TraceKey(engine_instance=instance, request_id=request_id))
