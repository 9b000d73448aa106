"""uvicorn's HTTP/1.1 connection with limits: how many, how large, how slow; and with the client's certificate.

h11 reads headers up to `MOST_HEADER_BYTES`. What is refused is answered with a status where that is still possible, and
counted.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from stream_monitor.monitor.access import certificates
from stream_monitor.monitor.access.gate import CERTIFICATE
from stream_monitor.monitor.access.refusals import HTTP, NOT_HTTP, TOO_LARGE, TOO_MANY_CONNECTIONS, TOO_SLOW, Refusals

MOST_HEADER_BYTES = 16 << 10
REQUEST_SECONDS = 10.0
"""From the connection, or the end of the answer before, until a request has come whole; uvicorn closes a connection
that is silent after an answer earlier."""


def limited(refusals: Refusals, max_connections: int) -> Callable[..., asyncio.Protocol]:
    """The connection class for uvicorn's setting `http`."""

    class Limited(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self._refuse(TOO_MANY_CONNECTIONS, 503, f"{max_connections} connections are open")
                return
            self._late = self.loop.call_later(REQUEST_SECONDS, self._too_late)
            connection = transport.get_extra_info("ssl_object")
            if connection is not None:
                self.app = _with_certificate(self.app, connection)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
                self._stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._stop_waiting()
            self._late = self.loop.call_later(REQUEST_SECONDS, self._too_late)

        def send_400_response(self, msg: str) -> None:
            if self.conn.their_state is h11.ERROR and self.conn.trailing_data[0][MOST_HEADER_BYTES:]:
                self._refuse(TOO_LARGE, 431, f"more than {MOST_HEADER_BYTES} bytes of headers")
                return
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                # Not by uvicorn's own answer: h11 raises on its body if the request was a HEAD.
                self._refuse(NOT_HTTP, 400, msg)
                return
            # An answer has begun: another one cannot follow it.
            refusals(HTTP, NOT_HTTP, self._peer)
            self.transport.close()
            self._abandon()

        def _too_late(self) -> None:
            if not self.transport.is_closing():
                self._refuse(TOO_SLOW, 408, f"no whole request in {REQUEST_SECONDS:.0f} seconds")

        def _refuse(self, reason: str, status: int, message: str) -> None:
            refusals(HTTP, reason, self._peer)
            body = f"{message}\n".encode()
            head = f"HTTP/1.1 {status} Refused\r\ncontent-type: text/plain\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
            self._stop_waiting()
            self.transport.close()
            self._abandon()

        def _abandon(self) -> None:
            """The connection was answered: what a request on it may still be answered goes nowhere, and is no error."""
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()

        @property
        def _peer(self) -> str:
            return f"{self.client[0]}:{self.client[1]}" if self.client else "unknown"

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Limited


def config(app: Any, refusals: Refusals, max_connections: int) -> Config:
    """uvicorn's settings for `app` under these limits."""
    return Config(
        app,
        http=limited(refusals, max_connections),  # type: ignore[arg-type]  # a class, as uvicorn's own
        ws="none",
        # At the level below, uvicorn says a line for each request that is none: whoever connects could fill the log.
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        timeout_graceful_shutdown=1,
    )


def _with_certificate(app: Any, connection: ssl.SSLObject) -> Any:
    """`app`, told the names of the certificate that was shown on the connection, if one was."""
    raw = connection.getpeercert(binary_form=True)
    if raw is None:
        return app
    names = certificates.names(ssl.DER_cert_to_PEM_cert(raw).encode())

    async def told(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "extensions": {**scope.get("extensions", {}), CERTIFICATE: names}}, receive, send)

    return told
