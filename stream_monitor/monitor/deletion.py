"""A request is deleted: from memory, from the store, from the queues of subscribers and from exemplars."""

import logging
import time
from collections.abc import Awaitable, Callable, Container, Sequence
from typing import Protocol

from stream_monitor.monitor.archive import Archive, StoreUnavailable
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.identity import TraceKey, parse
from stream_monitor.monitor.store import TraceStore

audit = logging.getLogger("stream_monitor.audit")


class DeletionUnfinished(Exception):
    """Not everything of a request is gone yet. One line, which says what is and what follows."""


class Deletes(Protocol):
    """Who removes requests for good."""

    async def delete(self, keys: Sequence[TraceKey], who: str) -> None:
        """Remove them; `who` asked, for the log. Raises DeletionUnfinished."""


class Deletion:
    """Deletes requests; what comes of them later is thrown away for `seconds`.

    Attributes:
        requests: deleted so far.
        beyond: removes them from what this monitor shares with others. Raises DeletionUnfinished.
    """

    def __init__(
        self,
        traces: TraceStore,
        events: EventLog,
        forget_exemplars: Callable[[Container[str]], None],
        archive: Archive,
        graveyard: Graveyard,
        seconds: float,
    ) -> None:
        self.requests = 0
        self.beyond: Callable[[Sequence[TraceKey]], Awaitable[None]] | None = None
        self._traces = traces
        self._events = events
        self._forget_exemplars = forget_exemplars
        self._archive = archive
        self._graveyard = graveyard
        self._nanoseconds = int(seconds * 1e9)

    async def delete(self, keys: Sequence[TraceKey], who: str, everywhere: bool = True) -> None:
        """Remove them for good; `who` asked, for the log. Without `everywhere` it is others who told us to.

        Raises DeletionUnfinished: they are gone from memory then.
        """
        until = time.time_ns() + self._nanoseconds
        gone = set(keys)
        for key in keys:
            self._graveyard.bury(key, until)
            self._traces.remove(key)
        self._events.forget(lambda event: (event.key.engine_instance, event.key.request_id) in gone)
        self._forget_exemplars({parse(request_id).external_id for _, request_id in keys})
        self.requests += len(keys)
        done, unfinished = "memory and store", None
        try:
            await self._archive.erase(list(keys), until)
        except StoreUnavailable as error:
            done = "memory"
            unfinished = DeletionUnfinished(
                f"{error}; gone from memory, the request leaves the store as soon as that is possible: ask again"
            )
        finally:
            # Who deleted how much and when; an id would keep alive what is to be gone.
            audit.info("%d requests deleted from %s, asked by %s", len(keys), done, who)
        if everywhere and self.beyond is not None:
            await self.beyond(keys)
        if unfinished is not None:
            raise unfinished
