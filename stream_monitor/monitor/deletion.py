"""A request is deleted: from memory, from the store, from the queues of subscribers and from exemplars."""

import logging
import time
from collections.abc import Sequence

from stream_monitor.monitor.archive import Archive
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.identity import TraceKey, parse
from stream_monitor.monitor.metrics import Metrics
from stream_monitor.monitor.store import TraceStore

audit = logging.getLogger("stream_monitor.audit")


class Deletion:
    """Deletes requests; what comes of them later is thrown away for `seconds`.

    Attributes:
        requests: deleted so far.
    """

    def __init__(
        self,
        traces: TraceStore,
        events: EventLog,
        metrics: Metrics,
        archive: Archive,
        graveyard: Graveyard,
        seconds: float,
    ) -> None:
        self.requests = 0
        self._traces = traces
        self._events = events
        self._metrics = metrics
        self._archive = archive
        self._graveyard = graveyard
        self._nanoseconds = int(seconds * 1e9)

    async def delete(self, keys: Sequence[TraceKey], who: str) -> None:
        """Remove them for good; `who` asked, for the log. Raises StoreUnavailable: they are gone from memory then."""
        until = time.time_ns() + self._nanoseconds
        gone = set(keys)
        for key in keys:
            self._graveyard.bury(key, until)
            self._traces.remove(key)
        self._events.forget(lambda event: (event.key.engine_instance, event.key.request_id) in gone)
        self._metrics.forget({parse(request_id).external_id for _, request_id in keys})
        self.requests += len(keys)
        done = "memory"
        try:
            await self._archive.erase(list(keys), until)
            done = "memory and store"
        finally:
            # Who deleted how much and when; an id would keep alive what is to be gone.
            audit.info("%d requests deleted from %s, asked by %s", len(keys), done, who)
