"""TLS before HTTP: a handshake that fails is counted, and one that takes too long is ended."""

import asyncio
import ssl
from collections.abc import Callable

from stream_monitor.monitor.access.refusals import HANDSHAKE, HTTP, Refusals

HANDSHAKE_SECONDS = 10.0
"""For a connection to become one of TLS, over HTTP and gRPC alike."""


class _First(asyncio.Protocol):
    """Takes what comes right behind a handshake, before we hear that it is done."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


class Handshake(asyncio.Protocol):
    """A new connection, until it speaks TLS; then `made` makes what goes on with it.

    `handshakes` keeps the tasks, so that they are not lost while they wait.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        made: Callable[[], asyncio.Protocol],
        refusals: Refusals,
        handshakes: set[asyncio.Task[None]],
    ) -> None:
        self._context = context
        self._made = made
        self._refusals = refusals
        self._handshakes = handshakes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; nothing is read before, or it would be lost."""
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        task = asyncio.get_running_loop().create_task(self._shake(transport))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _shake(self, transport: asyncio.Transport) -> None:
        first, loop = _First(), asyncio.get_running_loop()
        address = transport.get_extra_info("peername") or ("unknown", 0)
        try:
            secured = await loop.start_tls(
                transport, first, self._context, server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        except OSError:  # ssl.SSLError is one, and so is what says that the other side left or took too long.
            self._refusals(HTTP, HANDSHAKE, f"{address[0]}:{address[1]}")
            transport.abort()
            return
        if secured is None or first.lost:
            return
        protocol = self._made()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        if first.data:
            protocol.data_received(bytes(first.data))
