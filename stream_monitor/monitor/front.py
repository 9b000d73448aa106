"""Where a process answers: gRPC with health and reflection, and HTTP beside it."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.applications import Starlette

from stream_monitor.monitor.access.access import Access
from stream_monitor.monitor.access.http_tls import HANDSHAKE_SECONDS
from stream_monitor.monitor.http import HttpServer
from stream_monitor.monitor.listen import SOCKET_UMASK, ListenError, bind_tcp, prepare_unix

TRANSPORT_BYTES = 64 << 20
"""The transport's own limit on a message, well above ours, so that ours is the answer that names it and is counted.
What is larger still, the transport refuses by itself with RESOURCE_EXHAUSTED before it is in memory, uncounted."""
METADATA_BYTES = 16 << 10
"""Of one call; the transport refuses what is larger with RESOURCE_EXHAUSTED."""
REFRESH_SECONDS = 1.0
"""How often certificates and the access file are looked at."""

log = logging.getLogger(__name__)


class Front:
    """The ports of one process. `listen` and `bind_http` take them, `serve` answers on them, `close` gives them back.

    Attributes:
        services: full names of the gRPC services, for health and reflection.
        access: who may connect, and do what.
        ready: what /readyz says.
    """

    def __init__(
        self,
        services: Iterable[str],
        access: Access,
        largest_message: int = 0,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        """`interceptors` stand behind the one that asks who calls."""
        self._interceptors = interceptors
        self.services = tuple(services)
        self.ready = False
        self.health = health.aio.HealthServicer()
        self.access = access
        self._transport_bytes = max(TRANSPORT_BYTES, 4 * largest_message)
        self._servers: list[grpc.aio.Server] = []
        self._sockets: list[tuple[str, int]] = []
        self._bound: dict[str, socket.socket] = {}
        self._http: list[HttpServer] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._refreshing: asyncio.Task[None] | None = None

    def check(self, **addresses: str) -> None:
        """Refuse addresses, by the names of their settings, that others could reach. Raises ListenError."""
        for name, address in addresses.items():
            self.access.check(name, address)

    def bind_http(self, name: str, address: str) -> str:
        """Take the port for HTTP, by the name of its setting; the address with the real port. Raises ListenError."""
        if address.startswith("unix:"):
            raise ListenError(f"{name}: must be host:port")
        self._bound[name] = bind_tcp(name, address)
        return f"{address.rpartition(':')[0]}:{self._bound[name].getsockname()[1]}"

    def listen(self, name: str, address: str, *add: Callable[[grpc.aio.Server], None]) -> str:
        """Take an address for the gRPC services that `add` puts on a server; the address with the real port.

        Raises ListenError.
        """
        guard = self.access.interceptor()
        server = grpc.aio.server(
            interceptors=[guard, *self._interceptors],
            options=[
                # Two monitors on one port would each get half of the connections.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self._transport_bytes),
                ("grpc.max_send_message_length", -1),
                # Subscribers may hear nothing for hours and find out by pings whether the connection lives. So do we: a
                # peer that vanished without a word would else count as connected for as long as the kernel says.
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.ping_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.max_concurrent_streams", self.access.max_calls),
                ("grpc.max_allowed_incoming_connections", self.access.max_connections),
                ("grpc.max_metadata_size", METADATA_BYTES // 2),
                ("grpc.absolute_max_metadata_size", METADATA_BYTES),
                ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
            ],
        )
        for each in add:
            each(server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        reflection.enable_server_reflection((*self.services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        if address.startswith("unix:"):
            path = prepare_unix(name, address)
            before = os.umask(SOCKET_UMASK)
            try:
                server.add_insecure_port(f"unix:{path}")
            except RuntimeError as error:
                raise ListenError(f"{name}: cannot listen on {address}: {error}") from None
            finally:
                os.umask(before)
            guard.peers = self.access.peers(str(path))
            self._sockets.append((str(path), os.stat(path).st_ino))
            self._servers.append(server)
            return address
        # Tried first, as gRPC would say in its own words, before us, what is wrong.
        bind_tcp(name, address).close()
        certificates = self.access.certificates
        try:
            if certificates is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, certificates.grpc_credentials())
        except RuntimeError:
            raise ListenError(f"{name}: cannot listen on {address}: the address is in use or not ours") from None
        self._servers.append(server)
        return f"{address.rpartition(':')[0]}:{port}"

    async def give_up(self) -> None:
        """Let go of what was taken: the process does not come to serve."""
        for bound in self._bound.values():
            bound.close()
        await asyncio.gather(*(server.stop(0) for server in self._servers))

    async def serve(self, **apps: Starlette) -> None:
        """Answer on all ports, HTTP with these, by the name that the port was taken under; not yet ready."""
        await self._tell(health_pb2.HealthCheckResponse.NOT_SERVING)
        for server in self._servers:
            await server.start()
        certificates = self.access.certificates
        for name, bound in self._bound.items():
            context = certificates.context if certificates is not None and self.access.encrypts(name) else None
            http = HttpServer(apps[name], bound, self.access, context)
            self._http.append(http)
            serving = asyncio.create_task(http.serve())
            self._tasks.append(serving)
            while not http.started:
                if serving.done():
                    raise ListenError(f"{name}: cannot be served: {serving.exception() or 'it ended at once'}")
                await asyncio.sleep(0.005)
        self._refreshing = asyncio.create_task(self._refresh())

    async def set_ready(self, ready: bool = True) -> None:
        """Say on all ways whether requests are taken."""
        if ready != self.ready:
            serving = health_pb2.HealthCheckResponse
            await self._tell(serving.SERVING if ready else serving.NOT_SERVING)
            self.ready = ready

    async def announce_end(self) -> None:
        """NOT_SERVING, before anything ends."""
        self.ready = False
        await self.health.enter_graceful_shutdown()

    async def close(self, grace_seconds: float) -> None:
        """Calls get the grace; HTTP closes last."""
        await asyncio.gather(*(server.stop(grace_seconds) for server in self._servers))
        if self._refreshing is not None:
            self._refreshing.cancel()
        for http in self._http:
            http.should_exit = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for path, inode in self._sockets:
            with contextlib.suppress(FileNotFoundError):
                # Another process may have taken the place since.
                if os.stat(path).st_ino == inode:
                    os.unlink(path)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                self.access.refresh()
            except Exception:
                log.exception("access: looking for replaced files failed; it is tried again")

    async def _tell(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for name in ("", *self.services):
            await self.health.set(name, status)
