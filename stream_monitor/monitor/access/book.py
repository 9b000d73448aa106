"""The access file: who there is, what shows that it is them, and what they may do. Read again when it changes.

[[principal]]
name = "console"
token_sha256 = "9f86d08...0f00a08"      # `stream-monitor token` prints one; or token = "..." in the clear
rights = { subscribe = ["acme"], read_text = ["acme"] }

[[principal]]
name = "engines"
certificate = "spiffe://cluster.local/ns/serving/sa/engine"    # a name of a client certificate: SAN, or CN=...
rights = { publish = ["*"] }

[[principal]]
name = "prometheus"
anyone = true                           # without credentials; unix = true: without, over a Unix socket
rights = { metrics = ["*"] }
"""

import hashlib
import hmac
import logging
import os
import stat
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stream_monitor.monitor.access.rights import ANYBODY, EVERY_TENANT, Principal, Right, with_every_right
from stream_monitor.replaced import Mark, mark
from stream_monitor.tenants import check_tenant

SHORTEST_TOKEN = 16
LONGEST_TOKEN = 1024

MISSING, UNKNOWN_TOKEN, UNKNOWN_CERTIFICATE = "no_credential", "unknown_token", "unknown_certificate"
"""Why somebody was not recognised, as counted."""
MALFORMED = "malformed_credential"

log = logging.getLogger(__name__)


class AccessError(Exception):
    """The access file cannot be used. One line that names the file and what is wrong, and no secret."""


class NotRecognised(Exception):
    """Nobody known asks this; `reason` is one of the above."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotPermitted(Exception):
    """Somebody known asks for what they have no right to, for any tenant."""

    def __init__(self, principal: Principal, right: Right) -> None:
        super().__init__(f"{principal.name} does not have the right {right.value}")
        self.principal, self.right = principal, right


class _Entry(BaseModel):
    """One `[[principal]]`."""

    # Not even in an error's text may a token show.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=128)
    token: str | None = Field(None, min_length=SHORTEST_TOKEN, max_length=LONGEST_TOKEN, pattern=r"^[!-~]+$")
    token_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    certificate: str | None = Field(None, min_length=1, max_length=512)
    anyone: bool = False
    unix: bool = False
    rights: dict[Right, Annotated[list[str], Field(min_length=1)]]

    @field_validator("rights")
    @classmethod
    def _tenants(cls, rights: dict[Right, list[str]]) -> dict[Right, list[str]]:
        for right, tenants in rights.items():
            for tenant in tenants:
                try:
                    named = tenant == EVERY_TENANT or check_tenant(tenant)
                except ValueError as error:
                    raise ValueError(f"{right.value}: a tenant's name {error}") from None
                if not named:
                    raise ValueError(f'{right.value}: a tenant has a name; "*" means all of them')
            if right is Right.PUBLISH and len(tenants) > 1:
                raise ValueError('publish: name one tenant, to which all belongs that is published, or "*"')
            if right is Right.METRICS and tenants != [EVERY_TENANT]:
                raise ValueError('metrics: only "*", since /metrics covers all tenants')
        return rights

    @model_validator(mode="after")
    def _one_way(self) -> "_Entry":
        shown = [self.token, self.token_sha256, self.certificate, self.anyone or None, self.unix or None]
        if sum(each is not None for each in shown) != 1:
            raise ValueError("give one of token, token_sha256, certificate, anyone, unix")
        return self

    @property
    def digest(self) -> bytes | None:
        """SHA-256 of its token."""
        if self.token is not None:
            return hashlib.sha256(self.token.encode()).digest()
        return bytes.fromhex(self.token_sha256) if self.token_sha256 is not None else None

    def principal(self) -> Principal:
        """What it may do."""
        tenants = {right: frozenset(tenants) for right, tenants in self.rights.items()}
        return Principal(self.name, tenants, anonymous=self.anyone or self.unix)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    principal: list[_Entry]

    @field_validator("principal")
    @classmethod
    def _distinct(cls, entries: list[_Entry]) -> list[_Entry]:
        for what in ("name", "digest", "certificate"):
            values = [value for entry in entries if (value := getattr(entry, what)) is not None]
            if len(set(values)) < len(values):
                raise ValueError(f"two principals have the same {'token' if what == 'digest' else what}")
        for what in ("anyone", "unix"):
            if sum(getattr(entry, what) for entry in entries) > 1:
                raise ValueError(f"two principals have {what} = true")
        return entries


class Book:
    """Who is who.

    Without a file everybody may do everything, or, where client certificates are asked for, whoever has one.

    Args:
        path: of the access file; empty for none.
        certificates: whether client certificates are asked for.

    Attributes:
        reloads: how often the file was read again, and how often that failed (the old content stands then).

    Raises:
        AccessError: the file cannot be used.
    """

    def __init__(self, path: str = "", certificates: bool = False) -> None:
        self.path = Path(path) if path else None
        self.reloads = {"done": 0, "failed": 0}
        self._certificates = certificates
        self._seen: Mark = ()
        self._tokens: list[tuple[bytes, Principal]] = []
        self._by_certificate: dict[str, Principal] = {}
        self._anyone: Principal | None = None
        self._unix: Principal | None = None
        if self.path is not None:
            self._seen = mark([self.path])
            self._take(_read(self.path))

    @property
    def open(self) -> bool:
        """Whether everybody may do everything."""
        return self.path is None and not self._certificates

    def refresh(self) -> bool:
        """Read the file again if it changed; whether it did. What cannot be used is said and counted, no more."""
        if self.path is None:
            return False
        seen = mark([self.path])
        if seen == self._seen:
            return False
        # Before reading: what is written meanwhile is another change.
        self._seen = seen
        try:
            self._take(_read(self.path))
        except AccessError as error:
            self.reloads["failed"] += 1
            log.error("access: %s; what was read before holds on", error)
            return False
        self.reloads["done"] += 1
        log.info("access: %s was read again", self.path)
        return True

    def admit(
        self, right: Right, token: str | None, certificate: Iterable[str] | None, unix: bool = False
    ) -> Principal:
        """Who shows these credentials, if they have a right for any tenant; the rest as `recognise`.

        Raises:
            NotRecognised, NotPermitted.
        """
        principal = self.recognise(token, certificate, unix)
        if principal.has(right):
            return principal
        if principal.anonymous:
            raise _nobody(certificate is not None)
        raise NotPermitted(principal, right)

    def recognise(self, token: str | None, certificate: Iterable[str] | None, unix: bool = False) -> Principal:
        """Who shows these credentials.

        Args:
            token: the bearer token.
            certificate: names of the client's certificate, which was verified; None without one.
            unix: whether it came over a Unix socket.

        Raises:
            NotRecognised.
        """
        if self.path is None:
            if not self._certificates:
                return ANYBODY
            if certificate is None and not unix:
                raise NotRecognised(MISSING, "a client certificate is needed")
            return with_every_right("unix" if certificate is None else next(iter(certificate), "certificate"))
        if token is not None:
            return self._of_token(token)
        for name in certificate or ():
            if (known := self._by_certificate.get(name)) is not None:
                return known
        found = (self._unix if unix else None) or self._anyone
        if found is None:
            raise _nobody(certificate is not None)
        return found

    def by_name(self, name: str) -> tuple[Principal, bytes] | None:
        """A principal with a token, and the token's digest."""
        return next(((each, digest) for digest, each in self._tokens if each.name == name), None)

    def _of_token(self, token: str) -> Principal:
        digest = hashlib.sha256(token.encode(errors="surrogateescape")).digest()
        found = None
        for held, principal in self._tokens:
            # All of them, so that the time tells nothing.
            if hmac.compare_digest(held, digest):
                found = principal
        if found is None:
            raise NotRecognised(UNKNOWN_TOKEN, "the token is nobody's who has access")
        return found

    def _take(self, entries: list[_Entry]) -> None:
        self._tokens = [(entry.digest, entry.principal()) for entry in entries if entry.digest is not None]
        self._by_certificate = {entry.certificate: entry.principal() for entry in entries if entry.certificate}
        self._anyone = next((entry.principal() for entry in entries if entry.anyone), None)
        self._unix = next((entry.principal() for entry in entries if entry.unix), None)


def _nobody(with_certificate: bool) -> NotRecognised:
    if with_certificate:
        return NotRecognised(UNKNOWN_CERTIFICATE, "the client certificate is nobody's who has access")
    return NotRecognised(MISSING, "a credential is needed: a bearer token, or a client certificate")


def bearer(header: str | None) -> str | None:
    """The token in an `authorization` header; None without one. Raises NotRecognised if it is of another kind."""
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token or len(token) > LONGEST_TOKEN:
        raise NotRecognised(MALFORMED, "the authorization header must be: Bearer TOKEN")
    return token


def _read(path: Path) -> list[_Entry]:
    try:
        with path.open("rb") as opened:
            if os.fstat(opened.fileno()).st_mode & (stat.S_IWOTH | stat.S_IROTH):
                log.warning("access: %s is open to every user of this host; it should be 0640 or stricter", path)
            return _File.model_validate(tomllib.load(opened)).principal
    except OSError as error:
        raise AccessError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        # Its own words would quote the file.
        raise AccessError(f"{path} is not TOML") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise AccessError(f"{path}: {where}: {first['msg']}") from None
