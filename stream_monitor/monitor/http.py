"""HTTP: /metrics for Prometheus, /healthz and /readyz for whoever restarts us, and the page for people."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp

from stream_monitor.monitor.access.access import Access
from stream_monitor.monitor.access.http_protocol import config
from stream_monitor.monitor.access.http_tls import Handshake
from stream_monitor.monitor.access.rights import Right


def application(registry: CollectorRegistry, ready: Callable[[], bool], access: Access, page: ASGIApp) -> Starlette:
    """The routes. `ready` says whether the monitor takes in messages; `page` answers all that is not for machines."""
    return Starlette(routes=[*_machines(registry, ready, access, "http"), Mount("/", page)])


def metrics_application(registry: CollectorRegistry, ready: Callable[[], bool], access: Access) -> Starlette:
    """The routes without the page, for the address of metrics alone."""
    return Starlette(routes=_machines(registry, ready, access, "metrics"))


def _machines(registry: CollectorRegistry, ready: Callable[[], bool], access: Access, name: str) -> list[BaseRoute]:
    async def metrics(request: Request) -> Response:
        # On the event loop (async), like everything that touches the monitor's state.
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(registry), headers={"content-type": content_type})

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        return PlainTextResponse("ready\n") if ready() else PlainTextResponse("not ready\n", 503)

    endpoint: ASGIApp = Route("/metrics", metrics)
    # Where certificates are all that shows who asks, whoever opened an address in the clear meant anybody.
    if access.book.path is not None or access.encrypts(name):
        endpoint = access.gate(endpoint, Right.METRICS)
    # Whether it lives is told to anybody: those who restart it show no credentials.
    return [
        Route("/metrics", endpoint),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
    ]


class HttpServer(uvicorn.Server):
    """uvicorn on our event loop, over TLS where there is a `context`; signals are the monitor's to handle."""

    def __init__(self, app: ASGIApp, bound: socket.socket, access: Access, context: ssl.SSLContext | None) -> None:
        super().__init__(config(app, access.refusals, access.max_connections))
        self._bound = bound
        self._context = context
        self._refusals = access.refusals
        self._handshakes: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's own, but for TLS: its files are not uvicorn's business, and a handshake has a deadline."""
        await self.lifespan.startup()

        def connection() -> asyncio.Protocol:
            made: Any = self.config.http_protocol_class
            protocol: asyncio.Protocol = made(self.config, self.server_state, self.lifespan.state)
            return protocol

        context, refusals = self._context, self._refusals
        factory = connection if context is None else lambda: Handshake(context, connection, refusals, self._handshakes)
        self.servers = [await asyncio.get_running_loop().create_server(factory, sock=self._bound)]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signal handlers alone."""
        yield
