"""Why somebody was turned away: counted each time, said in the log once a minute."""

import logging
import time
from collections.abc import Callable

from stream_monitor.monitor.access.book import MALFORMED, MISSING, UNKNOWN_CERTIFICATE, UNKNOWN_TOKEN
from stream_monitor.monitor.access.rights import Right

GRPC, HTTP = "grpc", "http"
"""Where somebody was turned away."""
PEER, HANDSHAKE, NOT_HTTP, UNREADABLE, TOO_MANY_CALLS, TOO_MANY_CONNECTIONS, TOO_SLOW, TOO_LARGE = (
    "unix_peer",
    "handshake",
    "not_http",
    "unreadable",
    "too_many_calls",
    "too_many_connections",
    "too_slow",
    "too_large",
)
_SAY_SECONDS = 60.0

audit = logging.getLogger("stream_monitor.audit")


def no_right(right: Right) -> str:
    """Why somebody who is known was turned away."""
    return f"no_right_{right.value}"


REASONS: dict[str, tuple[tuple[str, ...], str]] = {
    MISSING: ((GRPC, HTTP), "no credential came, and one is needed"),
    MALFORMED: ((GRPC, HTTP), "the authorization header is not `Bearer TOKEN`, or what signs in is not JSON"),
    UNKNOWN_TOKEN: ((GRPC, HTTP), "the token is nobody's"),
    UNKNOWN_CERTIFICATE: ((GRPC, HTTP), "the client certificate is trusted, and nobody's who has access"),
    **{
        no_right(right): (places, f"known, without the right `{right.value}`")
        for right, places in (
            (Right.PUBLISH, (GRPC,)),
            (Right.SUBSCRIBE, (GRPC, HTTP)),
            (Right.DELETE, (GRPC,)),
            (Right.METRICS, (HTTP,)),
        )
    },
    PEER: ((GRPC,), "a connection to a Unix socket of a user who may not use it (`socket_uids`)"),
    HANDSHAKE: ((HTTP,), "no TLS, or a client certificate that is not to be trusted; gRPC does not tell of its own"),
    NOT_HTTP: ((HTTP,), "what came was no HTTP request"),
    UNREADABLE: ((GRPC,), "what came was no message of the kind that the method takes"),
    TOO_MANY_CALLS: ((GRPC,), "`max_calls` calls of the method ran already"),
    TOO_MANY_CONNECTIONS: ((HTTP,), "`max_connections` were open already"),
    TOO_SLOW: ((HTTP,), "a request was not there in time"),
    TOO_LARGE: ((HTTP,), "the headers or the body of a request were too large"),
}
"""Reason to where it may occur and what it means: the label values of `stream_monitor_access_refused_total`."""


class Refusals:
    """Counts by `count(where, reason)`."""

    def __init__(self, count: Callable[[str, str], None]) -> None:
        self._count = count
        self._said: dict[tuple[str, str], float] = {}
        self._held: dict[tuple[str, str], int] = {}

    def __call__(self, where: str, reason: str, who: str) -> None:
        """Somebody, at the address or of the name `who`, was turned away."""
        self._count(where, reason)
        now = time.monotonic()
        key = where, reason
        if now - self._said.get(key, -_SAY_SECONDS) < _SAY_SECONDS:
            self._held[key] = self._held.get(key, 0) + 1
            return
        self._said[key] = now
        held = self._held.pop(key, 0)
        audit.warning(
            "refused over %s: %s (%s)%s", where, reason, who[:200], f", and {held} more of the kind" if held else ""
        )
