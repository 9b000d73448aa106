"""The monitor put together: what listens where, what starts and stops in which order."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from stream_monitor.config import MonitorSettings
from stream_monitor.monitor import ingest, service
from stream_monitor.monitor.archive import Archive
from stream_monitor.monitor.calibration import Calibration
from stream_monitor.monitor.database_file import StoreRefused
from stream_monitor.monitor.deletion import Deletion
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.http import HttpServer, application
from stream_monitor.monitor.ingest import Ingest
from stream_monitor.monitor.listen import SOCKET_UMASK, ListenError, bind_tcp, check_exposure, prepare_unix
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
from stream_monitor.v1alpha1 import monitor_pb2_grpc

TRANSPORT_BYTES = 64 << 20
"""The transport's own limit on a message, well above ours, so that ours is the answer that names it and is counted.
What is larger still, the transport refuses by itself with RESOURCE_EXHAUSTED before it is in memory, uncounted."""

DAY_SECONDS = 86_400
SERVICES = (ingest.SERVICE, service.SERVICE)


class MonitorServer:
    """One monitor. `start` returns when it serves; `stop` announces NOT_SERVING, then ends calls, then closes.

    Attributes:
        grpc_address, ingest_address, http_address: where it listens, with the real port where 0 was asked for.
    """

    def __init__(self, settings: MonitorSettings, version: str) -> None:
        self.settings = settings
        self.ingest_address, self.grpc_address, self.http_address = settings.ingest, settings.grpc, settings.http
        ranks = RankBook(settings.max_engines)
        self.store = TraceStore(settings.max_traces, settings.max_trace_bytes, settings.max_sentences)
        self.log = EventLog(settings.event_log, settings.subscriber_queue, settings.max_subscribers)
        graveyard = Graveyard()
        self.archive = Archive(self.log, self.store, graveyard)
        self.metrics = Metrics()
        self.deletion = Deletion(
            self.store, self.log, self.metrics, self.archive, graveyard, settings.store_days * DAY_SECONDS
        )
        calibration = Calibration.read(settings.profiles, settings.false_alarm_rate)
        merger = Merger(settings.merge_deadline_seconds)
        self.metrics.registry.register(StateCollector(version, ranks, merger, self.store, self.log, calibration))
        self.metrics.registry.register(StoreCollector(self.archive, self.deletion))
        self.ingest = Ingest(
            ranks,
            merger,
            Pipeline(
                self.store,
                self.log,
                self.metrics,
                calibration,
                Vocabularies.read(settings.tokenizers),
                self.archive,
                graveyard,
            ),
            self.metrics,
            settings.max_message_bytes,
        )
        self.service = MonitorService(Lookup(self.store, self.archive), self.log, self.deletion)
        refused = self._page_refused
        self.page = page(
            Api(self.service, ranks, version, text=bool(settings.tokenizers)),
            Live(self.service, settings.max_live_pages, refused),
            filter(None, map(str.strip, settings.http_hosts.split(","))),
            refused,
        )
        self.health = health.aio.HealthServicer()
        self.ready = False
        self._servers: list[grpc.aio.Server] = []
        self._sockets: list[tuple[str, int]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._http: HttpServer | None = None

    async def start(self) -> None:
        """Listen on all addresses and open the store. Raises ListenError or StoreRefused, one line."""
        settings = self.settings
        for name in ("ingest", "grpc", "http"):
            check_exposure(name, getattr(settings, name), settings.insecure)
        if settings.http.startswith("unix:"):
            raise ListenError("http: must be host:port")
        bound = bind_tcp("http", settings.http)
        self.http_address = f"{settings.http.rpartition(':')[0]}:{bound.getsockname()[1]}"
        try:
            if settings.ingest == settings.grpc:
                server, self.ingest_address = self._listen(
                    "ingest", settings.ingest, self._add_ingest, self._add_monitor
                )
                self.grpc_address = self.ingest_address
                self._servers = [server]
            else:
                for name, add in (("ingest", self._add_ingest), ("grpc", self._add_monitor)):
                    server, address = self._listen(name, getattr(settings, name), add)
                    setattr(self, f"{name}_address", address)
                    self._servers.append(server)
            if settings.store:
                seconds = settings.store_days * DAY_SECONDS
                await self.archive.open(Path(settings.store), seconds, settings.store_bytes, self.metrics.store_commits)
        except (ListenError, StoreRefused):
            bound.close()
            await asyncio.gather(*(server.stop(0) for server in self._servers))
            raise
        for name in SERVICES:
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)
        for server in self._servers:
            await server.start()
        self._http = HttpServer(application(self.metrics.registry, lambda: self.ready, self.page), bound)
        self._tasks = [asyncio.create_task(self._http.serve([bound])), asyncio.create_task(self._flush())]
        while not self._http.started:
            await asyncio.sleep(0.005)
        self.ready = True

    async def stop(self) -> None:
        """NOT_SERVING first; then streams end with UNAVAILABLE, other calls get the grace, HTTP closes last."""
        self.ready = False
        await self.health.enter_graceful_shutdown()
        self.ingest.stop()
        # Commits the last findings, so that subscribers get them.
        await self.archive.close()
        for subscriber in list(self.log.subscribers):
            subscriber.close()
        await asyncio.gather(*(server.stop(self.settings.shutdown_grace_seconds) for server in self._servers))
        serving, flushing = self._tasks
        flushing.cancel()
        if self._http is not None:
            self._http.should_exit = True
        await asyncio.gather(serving, flushing, return_exceptions=True)
        for path, inode in self._sockets:
            with contextlib.suppress(FileNotFoundError):
                # Another monitor may have taken the place since.
                if os.stat(path).st_ino == inode:
                    os.unlink(path)

    def _listen(self, name: str, address: str, *add: Callable[[grpc.aio.Server], None]) -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server(
            options=[
                # Two monitors on one port would each get half of the connections.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", max(TRANSPORT_BYTES, 4 * self.settings.max_message_bytes)),
                ("grpc.max_send_message_length", -1),
                # Subscribers may hear nothing for hours and find out by pings whether the connection lives.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ]
        )
        for each in add:
            each(server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        if address.startswith("unix:"):
            path = prepare_unix(name, address)
            before = os.umask(SOCKET_UMASK)
            try:
                server.add_insecure_port(f"unix:{path}")
            except RuntimeError as error:
                raise ListenError(f"{name}: cannot listen on {address}: {error}") from None
            finally:
                os.umask(before)
            self._sockets.append((str(path), os.stat(path).st_ino))
            return server, address
        # Tried first, as gRPC would say in its own words, before us, what is wrong.
        bind_tcp(name, address).close()
        try:
            port = server.add_insecure_port(address)
        except RuntimeError:
            raise ListenError(f"{name}: cannot listen on {address}: the address is in use or not ours") from None
        return server, f"{address.rpartition(':')[0]}:{port}"

    def _add_ingest(self, server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers((self.ingest.handler(),))

    def _add_monitor(self, server: grpc.aio.Server) -> None:
        monitor_pb2_grpc.add_MonitorServiceServicer_to_server(self.service, server)

    def _page_refused(self, reason: str) -> None:
        self.metrics.page_refused.labels(reason).inc()

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(min(0.25, self.settings.merge_deadline_seconds / 2))
            self.ingest.flush()
            self.log.tick()
