"""TLS: certificate, key and client CA from files, for gRPC and HTTP alike, read again when they are replaced.

A connection keeps what it was opened with; the next one gets what is there by then.
"""

import contextlib
import logging
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from stream_monitor.replaced import Mark, mark

log = logging.getLogger(__name__)


class TlsError(Exception):
    """Certificate files cannot be used. One line that names the file and what is wrong."""


@dataclass(frozen=True)
class Files:
    """PEM files: the chain that we show, its key, and, where clients must show one, the CAs of theirs (or None)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class _Loaded:
    chain: bytes
    key: bytes
    client_ca: bytes | None
    not_after: dict[str, float]


class Certificates:
    """What `files` hold, checked.

    Attributes:
        context: for HTTP; a client certificate is asked for where there is a client CA, and checked if it comes.
        reloads: how often files were read again, and how often that failed (what was there before stands then).

    Raises:
        TlsError: unreadable, no PEM, key of another certificate, expired, or not valid yet.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self.reloads = {"done": 0, "failed": 0}
        self._seen = self._changing = self._mark()
        self._loaded = self._read()
        self._newest = self._context()
        self.context = self._context()
        # Each handshake goes on with the newest context: one that is filled again would trust old CAs for ever.
        self.context.sni_callback = self._take_newest

    @property
    def not_after(self) -> dict[str, float]:
        """When what is in use expires, in Unix seconds: `certificate`, the earliest of its chain, and `client_ca`, the
        latest of them."""
        return self._loaded.not_after

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server: with a client CA, clients must show a certificate."""
        given = self._loaded

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """gRPC asks before each handshake, on a thread of its own. None: as before."""
            nonlocal given
            if given is self._loaded:
                return None
            given = self._loaded
            return _configuration(given)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given),
            changed,  # type: ignore[arg-type]  # the stubs do not know of None, which grpc documents
            self.files.client_ca is not None,
        )

    def refresh(self) -> None:
        """Take what was replaced, called every second. What cannot be used is said, counted, and changes nothing."""
        marks = self._mark()
        if marks != self._changing:
            # Certificate and key are not replaced at one instant: wait until nothing changes any more.
            self._changing = marks
            return
        if marks == self._seen:
            return
        self._seen = marks
        before = self._loaded
        try:
            self._loaded = self._read()
            self._newest = self._context()
        except TlsError as error:
            self._loaded = before
            self.reloads["failed"] += 1
            log.error("tls: %s; what was read before stays in use", error)
        else:
            self.reloads["done"] += 1
            log.info(
                "tls: %s was read again; valid until %s", self.files.certificate, _date(self.not_after["certificate"])
            )

    def _take_newest(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._newest

    def _context(self) -> ssl.SSLContext:
        """OpenSSL's own view of the files."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # No sessions that are resumed without a look at the client's certificate.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        try:
            context.load_cert_chain(self.files.certificate, self.files.key)
            if self.files.client_ca is not None:
                context.verify_mode = ssl.CERT_OPTIONAL
                context.load_verify_locations(self.files.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise TlsError(f"{self.files.certificate}: OpenSSL refuses it: {error}") from None
        return context

    def _read(self) -> _Loaded:
        files = self.files
        chain = _certificates(files.certificate)
        _check_key(files)
        not_after = {"certificate": min(_expiry(one) for one in chain)}
        if files.client_ca is not None:
            not_after["client_ca"] = max(_expiry(one) for one in _certificates(files.client_ca))
        now = time.time()
        begins = chain[0].not_valid_before_utc.timestamp()
        if begins > now:
            raise TlsError(f"{files.certificate} is not valid before {_date(begins)}")
        for path, name in ((files.certificate, "certificate"), (files.client_ca, "client_ca")):
            if not_after.get(name, now + 1) <= now:
                raise TlsError(f"{path} expired on {_date(not_after[name])}")
        client_ca = None if files.client_ca is None else _bytes(files.client_ca)
        return _Loaded(_bytes(files.certificate), _bytes(files.key), client_ca, not_after)

    def _mark(self) -> Mark:
        files = self.files
        return mark(path for path in (files.certificate, files.key, files.client_ca) if path is not None)


def _configuration(loaded: _Loaded) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(loaded.key, loaded.chain)], loaded.client_ca)


def names(pem: bytes) -> list[str]:
    """What a client certificate calls its owner, most telling first: its alternative names, then `CN=...`.

    `uri`, `dns` and `email` names stand as they are, such as `spiffe://cluster.local/ns/serving/sa/engine`.
    """
    certificate = x509.load_pem_x509_certificate(pem)
    found: list[str] = []
    with contextlib.suppress(x509.ExtensionNotFound):
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        for kind in (x509.UniformResourceIdentifier, x509.DNSName, x509.RFC822Name):
            found += alternative.get_values_for_type(kind)
    common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return found + [f"CN={one.value!s}" for one in common]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"cannot read {path}: {error.strerror}") from None


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_bytes(path))
    except ValueError:
        raise TlsError(f"{path} holds no PEM certificate") from None


def _check_key(files: Files) -> None:
    try:
        key = load_pem_private_key(_bytes(files.key), None)
    except (ValueError, TypeError):
        raise TlsError(f"{files.key} holds no PEM key without a pass phrase") from None
    if key.public_key() != _certificates(files.certificate)[0].public_key():
        raise TlsError(f"{files.key} is not the key of {files.certificate}")


def _expiry(certificate: x509.Certificate) -> float:
    return certificate.not_valid_after_utc.timestamp()


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
