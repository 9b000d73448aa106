"""`POST /api/signin` with `{"token": "..."}`: a browser's way in. The token is in no address, no log and no storage."""

import json
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stream_monitor.monitor.access.access import Access
from stream_monitor.monitor.access.book import MALFORMED, NotRecognised
from stream_monitor.monitor.access.gate import set_cookie, unauthenticated
from stream_monitor.monitor.access.refusals import HTTP, TOO_LARGE

MOST_BYTES = 4096
"""Of a request."""


class SigningIn:
    """Gives cookies for tokens (sessions.py)."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def sign_in(self, request: Request) -> Response:
        """A cookie for a token."""
        who = request.client.host if request.client else "unknown"
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                self._access.refusals(HTTP, TOO_LARGE, who)
                return JSONResponse(
                    {"code": "INVALID_ARGUMENT", "message": f"more than {MOST_BYTES} bytes"},
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                )
        try:
            principal = self._access.book.recognise(_token(request, bytes(body)), None)
            cookie = self._access.sessions.cookie(principal)
        except NotRecognised as error:
            self._access.refusals(HTTP, error.reason, who)
            return unauthenticated(str(error))
        except LookupError:
            return JSONResponse({"name": "anybody"})  # This monitor asks for no credentials.
        response = JSONResponse({"name": principal.name})
        set_cookie(response, request.url.scheme, cookie)
        return response

    async def sign_out(self, request: Request) -> Response:
        """The cookie is taken back."""
        response = JSONResponse({})
        set_cookie(response, request.url.scheme, "")
        return response


def _token(request: Request, body: bytes) -> str:
    """Raises NotRecognised."""
    # A form of another site could not send this type unasked.
    if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
        try:
            token = json.loads(body)["token"]
            if isinstance(token, str):
                return token
        except (ValueError, LookupError, TypeError):
            pass
    raise NotRecognised(MALFORMED, 'the body must be the JSON {"token": "..."}')
