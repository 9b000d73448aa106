"""Signing in, for browsers: a token once, then a cookie that holds for some hours and says nothing.

The cookie is the principal's name and a time, signed. What signs it is made anew when the process starts, together with
the token: both end the session, and so does the principal's leaving the access file.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
import time

from stream_monitor.monitor.access.book import Book
from stream_monitor.monitor.access.rights import Principal

SECONDS = 12 * 3600
"""How long one is signed in."""


class Sessions:
    """Makes cookies for principals of `book` with a token, and takes them back."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._key = secrets.token_bytes(32)

    def cookie(self, principal: Principal) -> str:
        """The value for somebody who has shown a token. Raises LookupError if the principal has none (any more)."""
        found = self._book.by_name(principal.name)
        if found is None:
            raise LookupError(principal.name)
        said = f"{int(time.time()) + SECONDS}:{principal.name}".encode()
        return f"{_text(said)}.{_text(self._signature(said, found[1]))}"

    def principal(self, cookie: str) -> Principal | None:
        """Whose cookie it is; None if it is not ours, or over."""
        try:
            said, signature = (base64.b64decode(part, b"-_", validate=True) for part in cookie.split(".", 1))
            until, _, name = said.decode().partition(":")
            found = self._book.by_name(name)
            if found is None or not hmac.compare_digest(self._signature(said, found[1]), signature):
                return None
            return found[0] if int(until) > time.time() else None
        except (binascii.Error, ValueError):
            return None

    def _signature(self, said: bytes, token: bytes) -> bytes:
        return hmac.digest(self._key + token, said, hashlib.sha256)


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode()
