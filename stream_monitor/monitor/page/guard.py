"""What stands before every answer that may hold a trace: who may ask, and what a browser may do with the answer."""

import ipaddress
from collections.abc import Callable, Iterable
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Script, style and data from this very address alone. Plotly paints heat maps as data: images.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

HOST, CROSS_SITE, TOO_MANY_PAGES = "host", "cross_site", "too_many_pages"
"""Why something was refused, as counted."""


class Guard:
    """ASGI middleware around the page and its API.

    * Another site's page can point its own name at our address (DNS rebinding) and would then be of our origin. So a
      browser that asks by a name must ask by one of `hosts`, or localhost; addresses cannot be rebound.
    * Another site's page can make requests without reading the answers. None of them gets as far as the API.
    * `refused` is told the reason of each refusal.
    * Who asks, and what they may read, is the business of `access.gate.AccessGate`, behind this.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], refused: Callable[[str], None]) -> None:
        self._app = app
        self._refused = refused
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on to the application."""
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        headers = Headers(scope=scope)
        app = self._app
        if not self._is_ours(host := headers.get("host", "")):
            self._refused(HOST)
            app = _refusal(f"host {host[:200]!r} is not one of this monitor's names (setting http_hosts)", 421)
        elif scope["path"].startswith("/api/") and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            self._refused(CROSS_SITE)
            app = _refusal("a page of another site may not ask this", 403)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    answered[name] = value
                answered.setdefault("cache-control", "no-store")
            await send(message)

        await app(scope, receive, send_guarded)

    def _is_ours(self, host: str) -> bool:
        name = host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()
        with suppress(ValueError):
            ipaddress.ip_address(name.strip("[]"))
            return True
        return name in self._hosts or name == "localhost" or name.endswith(".localhost")


def _refusal(reason: str, status: int) -> ASGIApp:
    return PlainTextResponse(f"{reason}\n", status)
