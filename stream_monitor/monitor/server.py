"""The monitor put together: what listens where, what starts and stops in which order."""

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from stream_monitor import compiled
from stream_monitor.config import MonitorSettings
from stream_monitor.monitor import ingest, service
from stream_monitor.monitor.access.access import Access
from stream_monitor.monitor.access.access_metrics import AccessCollector
from stream_monitor.monitor.archive import Archive
from stream_monitor.monitor.calibration import Calibration
from stream_monitor.monitor.calls import monitor_handler
from stream_monitor.monitor.database_file import StoreRefused
from stream_monitor.monitor.deletion import Deletion
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.fleet import outbox
from stream_monitor.monitor.fleet.link_metrics import LinkCollector
from stream_monitor.monitor.front import Front
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.http import application, metrics_application
from stream_monitor.monitor.ingest import Ingest
from stream_monitor.monitor.intake import Intake
from stream_monitor.monitor.listen import ListenError
from stream_monitor.monitor.lookup import Lookup
from stream_monitor.monitor.merge import Merger
from stream_monitor.monitor.metrics import Metrics
from stream_monitor.monitor.page.api import Api
from stream_monitor.monitor.page.live import Live
from stream_monitor.monitor.page.routes import page
from stream_monitor.monitor.pipeline import Pipeline
from stream_monitor.monitor.ranks import RankBook
from stream_monitor.monitor.scrape import StateCollector
from stream_monitor.monitor.service import MonitorService
from stream_monitor.monitor.store import TraceStore
from stream_monitor.monitor.store_metrics import StoreCollector
from stream_monitor.monitor.text import Vocabularies

if TYPE_CHECKING:
    from stream_monitor.monitor.fleet.link import Link

DAY_SECONDS = 86_400
SERVICES = (ingest.SERVICE, service.SERVICE)

log = logging.getLogger(__name__)


class MonitorServer:
    """One monitor. `start` returns when it serves; `stop` announces NOT_SERVING, then ends calls, then closes.

    Attributes:
        ends: nothing that may fail runs beside it.
        grpc_address, ingest_address, http_address, metrics_address: where it listens, with the real port where 0 was
            asked for.
    """

    def __init__(self, settings: MonitorSettings, version: str) -> None:
        self.settings = settings
        self.ingest_address, self.grpc_address, self.http_address = settings.ingest, settings.grpc, settings.http
        self.metrics_address = settings.metrics
        ranks = RankBook(settings.max_engines, settings.max_ranks_per_engine)
        self.store = TraceStore(
            settings.max_traces, settings.max_trace_bytes, settings.max_sentences, settings.max_requests_per_engine
        )
        self.log = EventLog(
            settings.event_log,
            settings.subscriber_queue,
            settings.max_subscribers,
            settings.max_principal_subscribers,
        )
        graveyard = Graveyard()
        self.archive = Archive(self.log, self.store, graveyard)
        self.metrics = Metrics()
        self.deletion = Deletion(
            self.store, self.log, self.metrics.forget, self.archive, graveyard, settings.store_days * DAY_SECONDS
        )
        calibration = Calibration.read(settings.profiles, settings.false_alarm_rate)
        merger = Merger(settings.merge_deadline_seconds)
        self.metrics.registry.register(StateCollector(version, ranks, merger, self.store, self.log, calibration))
        self.metrics.registry.register(StoreCollector(self.archive, self.deletion))
        pipeline = Pipeline(
            self.store,
            self.log,
            self.metrics,
            calibration,
            Vocabularies.read(settings.tokenizers),
            self.archive,
            graveyard,
        )
        self.intake = Intake(
            ranks, merger, pipeline, self.metrics, settings.max_message_bytes, settings.max_message_rate
        )
        self.ingest = Ingest(self.intake)
        self.service = MonitorService(Lookup(self.store, self.archive), self.log, self.deletion)
        refused = self._page_refused
        access = Access(settings, self.metrics.refused)
        self.metrics.registry.register(AccessCollector(access))
        self.page = page(
            Api(self.service, ranks, version, text=bool(settings.tokenizers)),
            Live(self.service, settings.max_live_pages, refused),
            filter(None, map(str.strip, settings.http_hosts.split(","))),
            refused,
            access,
        )
        self.archive.prepare = outbox.end
        self.link = self._join_fleet(graveyard) if settings.nats else None
        self.metrics.registry.register(LinkCollector(self.link))
        self.front = Front(SERVICES, access, settings.max_message_bytes)
        self.ends: asyncio.Task[None] | None = None
        self._flushing: asyncio.Task[None] | None = None

    @property
    def says(self) -> str:
        """What a person should know of it once it has started."""
        metrics = f", metrics {self.metrics_address}" if self.settings.metrics else ""
        return f"ready: ingest {self.ingest_address}, grpc {self.grpc_address}, http {self.http_address}{metrics}"

    async def start(self) -> None:
        """Listen on all addresses and open the store. Raises ListenError or StoreRefused, one line."""
        settings, front = self.settings, self.front
        front.check(ingest=settings.ingest, grpc=settings.grpc, http=settings.http)
        self.http_address = front.bind_http("http", settings.http)
        try:
            if settings.metrics:
                front.check(metrics=settings.metrics)
                self.metrics_address = front.bind_http("metrics", settings.metrics)
            if settings.ingest == settings.grpc:
                self.ingest_address = front.listen("ingest", settings.ingest, self._add_ingest, self._add_monitor)
                self.grpc_address = self.ingest_address
            else:
                self.ingest_address = front.listen("ingest", settings.ingest, self._add_ingest)
                self.grpc_address = front.listen("grpc", settings.grpc, self._add_monitor)
            if settings.store:
                seconds = settings.store_days * DAY_SECONDS
                await self.archive.open(Path(settings.store), seconds, settings.store_bytes, self.metrics.store_commits)
        except (ListenError, StoreRefused):
            await front.give_up()
            raise
        if self.link is not None:
            self.link.start()
        compiled.prepare()
        registry, access = self.metrics.registry, front.access
        await front.serve(
            http=application(registry, lambda: front.ready, access, self.page),
            metrics=metrics_application(registry, lambda: front.ready, access),
        )
        self._flushing = asyncio.create_task(self._flush())
        await front.set_ready()

    async def stop(self) -> None:
        """NOT_SERVING first; then streams end with UNAVAILABLE, other calls get the grace, HTTP closes last."""
        await self.front.announce_end()
        self.ingest.stop()
        # Commits the last findings, so that subscribers get them.
        await self.archive.settle()
        if self.link is not None:
            await self.link.stop(self.settings.shutdown_grace_seconds)
        await self.archive.close()
        for subscriber in list(self.log.subscribers):
            subscriber.close()
        if self._flushing is not None:
            self._flushing.cancel()
        await self.front.close(self.settings.shutdown_grace_seconds)

    def _add_ingest(self, server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers((self.ingest.handler(),))

    def _add_monitor(self, server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers((monitor_handler(self.service, self.front.access.refusals),))

    def _join_fleet(self, graveyard: Graveyard) -> "Link":
        # Imported here: most monitors have no fleet, and the broker's library is an extra.
        from stream_monitor.monitor.fleet.link import Link

        return Link(self.settings, self.archive, self.log, self.store, graveyard, self.deletion)

    def _page_refused(self, reason: str) -> None:
        self.metrics.page_refused.labels(reason).inc()

    async def _flush(self) -> None:
        said = ""
        while True:
            await asyncio.sleep(min(0.25, self.settings.merge_deadline_seconds / 2))
            try:
                self.intake.flush()
                self.log.tick()
            except Exception as error:
                # A fault of ours must not end what lets go of late steps and of engines that are gone.
                if said != (said := repr(error)):
                    log.exception("letting go of what is late failed; it is tried again")
