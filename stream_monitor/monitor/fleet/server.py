"""A process of a fleet put together: it reads the stream and answers for all monitors that publish to it."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stream_monitor.config import FleetSettings
from stream_monitor.monitor import service
from stream_monitor.monitor.access.access import Access
from stream_monitor.monitor.archive import Archive
from stream_monitor.monitor.calls import monitor_handler
from stream_monitor.monitor.deletion import Deletion
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.fleet.broker import Broker
from stream_monitor.monitor.fleet.ending import end
from stream_monitor.monitor.fleet.metrics import FleetMetrics
from stream_monitor.monitor.fleet.reader import FleetDeletion, Reader
from stream_monitor.monitor.front import Front
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.http import application, metrics_application
from stream_monitor.monitor.listen import ListenError
from stream_monitor.monitor.lookup import Lookup
from stream_monitor.monitor.page.api import Api
from stream_monitor.monitor.page.live import Live
from stream_monitor.monitor.page.routes import page
from stream_monitor.monitor.service import MonitorService
from stream_monitor.monitor.store import TraceStore

NOT_YET = "this process has not read the whole stream yet; ask another one, or again"
SERVICE_PREFIX = f"/{service.SERVICE}/"


class FleetServer:
    """One process. `start` returns when it listens; it answers once it has read what the stream holds.

    Attributes:
        grpc_address, http_address, metrics_address: where it listens, with the real port where 0 was asked for.
        ends: the reading of the stream, which ends if it fails.
    """

    def __init__(self, settings: FleetSettings, version: str) -> None:
        """Raises SettingsError, TlsError or AccessError."""
        self.settings = settings
        self.grpc_address, self.http_address = settings.grpc, settings.http
        self.metrics_address = settings.metrics
        self.broker = Broker(settings, settings.insecure, f"stream-monitor fleet {settings.fleet_name}")
        self.log = EventLog(
            settings.event_log,
            settings.subscriber_queue,
            settings.max_subscribers,
            settings.max_principal_subscribers,
            shared=True,
        )
        graveyard = Graveyard()
        # Requests run in monitors, none in here.
        running = TraceStore(max_traces=1, max_bytes=1, max_sentences=1, max_running=1)
        self.archive = Archive(self.log, running, graveyard)
        self.metrics = FleetMetrics()
        here = Deletion(running, self.log, lambda _: None, self.archive, graveyard, settings.nats_days * 86_400)
        access = Access(settings, self.metrics.access_refused)
        self.front = Front((service.SERVICE,), access, interceptors=(_Gate(self),))
        self.reader = Reader(
            self.broker,
            Path(settings.fleet_store),
            f"fleet-{settings.fleet_name.replace('.', '-')}",
            self.archive,
            self.log,
            graveyard,
            here,
            self.metrics.commits,
            self.front.set_ready,
        )
        self.metrics.watch(version, self.broker, self.reader, self.log, self.archive, here, access)
        self.log.sent = self.metrics.sent
        self.service = MonitorService(Lookup(running, self.archive), self.log, FleetDeletion(self.broker, here))
        refused = self.metrics.page_refused
        shown = page(
            Api(self.service, None, version, text=True),
            Live(self.service, settings.max_live_pages, refused),
            filter(None, map(str.strip, settings.http_hosts.split(","))),
            refused,
            access,
        )
        self._page = _GatedPage(self, shown)
        self.ends: asyncio.Task[None] | None = None

    @property
    def says(self) -> str:
        """What a person should know of it once it has started."""
        metrics = f", metrics {self.metrics_address}" if self.settings.metrics else ""
        addresses = f"grpc {self.grpc_address}, http {self.http_address}{metrics}"
        return f"listening: {addresses}; ready when /readyz says so"

    async def start(self) -> None:
        """Listen, and begin to read. Raises ListenError."""
        settings, front = self.settings, self.front
        front.check(grpc=settings.grpc, http=settings.http)
        self.http_address = front.bind_http("http", settings.http)
        try:
            if settings.metrics:
                front.check(metrics=settings.metrics)
                self.metrics_address = front.bind_http("metrics", settings.metrics)
            self.grpc_address = front.listen("grpc", settings.grpc, self._add_service)
        except ListenError:
            await front.give_up()
            raise
        registry, access = self.metrics.registry, front.access
        await front.serve(
            http=application(registry, lambda: front.ready, access, self._page),
            metrics=metrics_application(registry, lambda: front.ready, access),
        )
        self.ends = asyncio.create_task(self.reader.run())

    async def stop(self) -> None:
        """As a monitor stops: NOT_SERVING first, HTTP last."""
        await self.front.announce_end()
        if self.ends is not None:
            await end(self.ends)
        await self.broker.close()
        for subscriber in list(self.log.subscribers):
            subscriber.close()
        await self.archive.settle()
        await self.archive.close()
        await self.front.close(self.settings.shutdown_grace_seconds)

    def _add_service(self, server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers((monitor_handler(self.service, self.front.access.refusals),))


class _Gate(grpc.aio.ServerInterceptor):
    """UNAVAILABLE as long as the process knows less than the others."""

    def __init__(self, server: FleetServer) -> None:
        self._server = server

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Hand the call on, or refuse it."""
        handler = await continuation(details)
        if handler is None or self._server.front.ready or not details.method.startswith(SERVICE_PREFIX):
            return handler
        if handler.response_streaming:
            return handler._replace(unary_stream=_refuse_stream)
        return handler._replace(unary_unary=_refuse)


async def _refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, NOT_YET)


async def _refuse_stream(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    await context.abort(grpc.StatusCode.UNAVAILABLE, NOT_YET)
    yield


class _GatedPage:
    """The same of the page."""

    def __init__(self, server: FleetServer, shown: ASGIApp) -> None:
        self._server = server
        self._shown = shown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say that it is too early."""
        app = self._shown if self._server.front.ready else PlainTextResponse(f"{NOT_YET}\n", 503)
        await app(scope, receive, send)
