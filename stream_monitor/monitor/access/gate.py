"""What stands before HTTP requests: who asks, by bearer token, session cookie or client certificate, and may they.

401 no credential where one is needed, or one that is not known; 403 known, and without the right.
"""

from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stream_monitor.monitor.access.book import Book, NotPermitted, NotRecognised, bearer
from stream_monitor.monitor.access.refusals import HTTP, Refusals, no_right
from stream_monitor.monitor.access.rights import Principal, Right, run_as
from stream_monitor.monitor.access.sessions import SECONDS, Sessions
from stream_monitor.monitor.access.standing import Revoked, Standing

CERTIFICATE = "stream_monitor.certificate"
"""Where the connection (http_protocol.py) puts the names of the client's certificate, which was verified."""


class AccessGate:
    """ASGI middleware: `app` for those who have `right` for any tenant, on whose behalf it then runs."""

    def __init__(
        self, app: ASGIApp, right: Right, book: Book, sessions: Sessions, standing: Standing, refusals: Refusals
    ) -> None:
        self._app = app
        self._right = right
        self._book = book
        self._sessions = sessions
        self._standing = standing
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on to the application."""
        try:
            principal = self._recognise(scope)
        except NotRecognised as error:
            self._refusals(HTTP, error.reason, _client(scope))
            await unauthenticated(str(error))(scope, receive, send)
            return
        except NotPermitted as error:
            self._refusals(HTTP, no_right(self._right), error.principal.name)
            await _refusal(403, "PERMISSION_DENIED", str(error))(scope, receive, send)
            return
        run_as(principal)
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            with self._standing.holding(principal, lambda: self._recognise(scope)):
                await self._app(scope, receive, sending)
        except Revoked as error:
            if began:
                await send({"type": "http.response.body"})
            else:
                await unauthenticated(str(error))(scope, receive, send)

    def _recognise(self, scope: Scope) -> Principal:
        headers = Headers(scope=scope)
        token = bearer(headers.get("authorization"))
        if token is None and (held := _cookie(headers, scope["scheme"])) is not None:
            known = self._sessions.principal(held)
            if known is not None:
                if not known.has(self._right):
                    raise NotPermitted(known, self._right)
                return known
        names: Iterable[str] | None = scope.get("extensions", {}).get(CERTIFICATE)
        return self._book.admit(self._right, token, names)


def unauthenticated(message: str) -> Response:
    """The answer to somebody who is not known."""
    response = _refusal(401, "UNAUTHENTICATED", message)
    response.headers["www-authenticate"] = 'Bearer realm="stream-monitor"'
    return response


def set_cookie(response: Response, scheme: str, value: str) -> None:
    """Sign in with `value`, or, if it is empty, out."""
    response.set_cookie(
        _name(scheme),
        value,
        max_age=SECONDS if value else 0,
        path="/",
        httponly=True,
        samesite="strict",
        secure=scheme == "https",
    )


def _refusal(status: int, code: str, message: str) -> Response:
    return JSONResponse({"code": code, "message": message}, status, {"cache-control": "no-store"})


def _name(scheme: str) -> str:
    # With the prefix a browser takes it from nobody but this host, over TLS.
    return "__Host-stream-monitor" if scheme == "https" else "stream-monitor"


def _cookie(headers: Headers, scheme: str) -> str | None:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(_name(scheme))
    except CookieError:
        return None
    return found.value if found is not None else None


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "unknown"
