"""Where a process answers: gRPC with health and reflection, and HTTP beside it."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.applications import Starlette

from stream_monitor.monitor.http import HttpServer
from stream_monitor.monitor.listen import SOCKET_UMASK, ListenError, bind_tcp, check_exposure, prepare_unix

TRANSPORT_BYTES = 64 << 20
"""The transport's own limit on a message, well above ours, so that ours is the answer that names it and is counted.
What is larger still, the transport refuses by itself with RESOURCE_EXHAUSTED before it is in memory, uncounted."""


class Front:
    """The ports of one process. `listen` and `bind_http` take them, `serve` answers on them, `close` gives them back.

    Attributes:
        services: full names of the gRPC services, for health and reflection.
        ready: what /readyz says.
    """

    def __init__(self, services: Iterable[str], insecure: bool, largest_message: int = 0) -> None:
        self.services = tuple(services)
        self.ready = False
        self.health = health.aio.HealthServicer()
        self._insecure = insecure
        self._transport_bytes = max(TRANSPORT_BYTES, 4 * largest_message)
        self._servers: list[grpc.aio.Server] = []
        self._sockets: list[tuple[str, int]] = []
        self._bound: socket.socket | None = None
        self._http: HttpServer | None = None
        self._serving: asyncio.Task[None] | None = None

    def check(self, **addresses: str) -> None:
        """Refuse addresses, by the names of their settings, that others could reach. Raises ListenError."""
        for name, address in addresses.items():
            check_exposure(name, address, self._insecure)

    def bind_http(self, address: str) -> str:
        """Take the port for HTTP; the address with the real port. Raises ListenError."""
        if address.startswith("unix:"):
            raise ListenError("http: must be host:port")
        self._bound = bind_tcp("http", address)
        return f"{address.rpartition(':')[0]}:{self._bound.getsockname()[1]}"

    def listen(self, name: str, address: str, *add: Callable[[grpc.aio.Server], None]) -> str:
        """Take an address for the gRPC services that `add` puts on a server; the address with the real port.

        Raises ListenError.
        """
        server = grpc.aio.server(
            options=[
                # Two monitors on one port would each get half of the connections.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self._transport_bytes),
                ("grpc.max_send_message_length", -1),
                # Subscribers may hear nothing for hours and find out by pings whether the connection lives.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ]
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
            self._sockets.append((str(path), os.stat(path).st_ino))
            self._servers.append(server)
            return address
        # Tried first, as gRPC would say in its own words, before us, what is wrong.
        bind_tcp(name, address).close()
        try:
            port = server.add_insecure_port(address)
        except RuntimeError:
            raise ListenError(f"{name}: cannot listen on {address}: the address is in use or not ours") from None
        self._servers.append(server)
        return f"{address.rpartition(':')[0]}:{port}"

    async def give_up(self) -> None:
        """Let go of what was taken: the process does not come to serve."""
        if self._bound is not None:
            self._bound.close()
        await asyncio.gather(*(server.stop(0) for server in self._servers))

    async def serve(self, app: Starlette) -> None:
        """Answer on all ports, HTTP with `app`; not yet ready."""
        assert self._bound is not None
        await self._tell(health_pb2.HealthCheckResponse.NOT_SERVING)
        for server in self._servers:
            await server.start()
        self._http = HttpServer(app, self._bound)
        self._serving = asyncio.create_task(self._http.serve([self._bound]))
        while not self._http.started:
            await asyncio.sleep(0.005)

    async def set_ready(self) -> None:
        """Say on all ways that requests are taken."""
        await self._tell(health_pb2.HealthCheckResponse.SERVING)
        self.ready = True

    async def announce_end(self) -> None:
        """NOT_SERVING, before anything ends."""
        self.ready = False
        await self.health.enter_graceful_shutdown()

    async def close(self, grace_seconds: float) -> None:
        """Calls get the grace; HTTP closes last."""
        await asyncio.gather(*(server.stop(grace_seconds) for server in self._servers))
        if self._http is not None and self._serving is not None:
            self._http.should_exit = True
            await asyncio.gather(self._serving, return_exceptions=True)
        for path, inode in self._sockets:
            with contextlib.suppress(FileNotFoundError):
                # Another process may have taken the place since.
                if os.stat(path).st_ino == inode:
                    os.unlink(path)

    async def _tell(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for name in ("", *self.services):
            await self.health.set(name, status)
