"""Everything about access in one object, made from the settings of a process that listens."""

from collections.abc import Callable
from pathlib import Path

from starlette.types import ASGIApp

from stream_monitor.config import AccessSettings
from stream_monitor.monitor.access.book import Book
from stream_monitor.monitor.access.certificates import Certificates, Files, TlsError
from stream_monitor.monitor.access.gate import AccessGate
from stream_monitor.monitor.access.interceptor import AccessInterceptor
from stream_monitor.monitor.access.peers import Peers
from stream_monitor.monitor.access.refusals import GRPC, PEER, Refusals
from stream_monitor.monitor.access.rights import Right
from stream_monitor.monitor.access.sessions import Sessions
from stream_monitor.monitor.access.standing import Standing
from stream_monitor.monitor.listen import check_exposure

SESSIONS_EVERY = 60
"""At how many looks at the files it is looked whether sessions are over."""


class Access:
    """What a process needs to know about whoever connects to it.

    Args:
        settings: read once.
        count: told of each refusal, where ("grpc", "http") and why (refusals.py).

    Attributes:
        certificates: None where TLS is off.
        book: who is who.

    Raises:
        TlsError, AccessError: files that cannot be used. One line.
    """

    def __init__(self, settings: AccessSettings, count: Callable[[str, str], None]) -> None:
        self.certificates = _certificates(settings)
        self.book = Book(settings.access, certificates=bool(settings.tls_client_ca))
        self.sessions = Sessions(self.book)
        self.refusals = Refusals(count)
        self._standing = Standing()
        self._refreshed = 0
        self.max_calls, self.max_connections = settings.max_calls, settings.max_connections
        self._insecure, self._metrics_insecure = settings.insecure, settings.metrics_insecure
        self._users = frozenset(int(each) for each in settings.socket_uids.split(",") if each.strip())

    def check(self, name: str, address: str) -> None:
        """Refuse an address, by the name of its setting, that others could reach. Raises ListenError."""
        allowed = self._insecure or self.certificates is not None or (name == "metrics" and self._metrics_insecure)
        check_exposure(name, address, allowed)

    def encrypts(self, name: str) -> bool:
        """Whether HTTP at the address of this setting speaks TLS."""
        return self.certificates is not None and not (name == "metrics" and self._metrics_insecure)

    def interceptor(self) -> AccessInterceptor:
        """What stands before the gRPC calls of one address."""
        return AccessInterceptor(self.book, self._standing, self.refusals, self.max_calls)

    def peers(self, path: str) -> Peers:
        """Who may be at the other end of the Unix socket at `path`, which exists."""
        return Peers(path, self._users, lambda: self.refusals(GRPC, PEER, path))

    def gate(self, app: ASGIApp, right: Right) -> AccessGate:
        """`app` for those who have a right."""
        return AccessGate(app, right, self.book, self.sessions, self._standing, self.refusals)

    def refresh(self) -> None:
        """Look whether files were replaced. Called about once a second."""
        self._refreshed += 1
        # Sessions end without a change of the file.
        if self.book.refresh() or self._refreshed % SESSIONS_EVERY == 0:
            self._standing.check()
        if self.certificates is not None:
            self.certificates.refresh()


def _certificates(settings: AccessSettings) -> Certificates | None:
    certificate, key, client_ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if not certificate and not key:
        if client_ca:
            raise TlsError("tls_client_ca needs tls_certificate and tls_key: without TLS there are no certificates")
        return None
    if not (certificate and key):
        raise TlsError(f"{'tls_key' if certificate else 'tls_certificate'} is missing; give both or none of the two")
    return Certificates(Files(Path(certificate), Path(key), Path(client_ca) if client_ca else None))
