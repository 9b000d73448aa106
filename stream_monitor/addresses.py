"""Addresses as settings give them: `unix:/path` or `host:port`, and those of brokers."""

import ipaddress
from contextlib import suppress
from urllib.parse import urlsplit


def check_address(value: str) -> str:
    """Return `value` if it is unix:/path or host:port, else raise ValueError."""
    if value.startswith("unix:") and len(value) > len("unix:"):
        return value
    host, _, port = value.rpartition(":")
    if host and port.isdigit() and int(port) < 65536:
        return value
    raise ValueError("must be unix:/path or host:port")


def is_local(address: str) -> bool:
    """Whether only processes of this host can be at the other end of an address."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def check_broker(value: str) -> str:
    """Return `value` if it is nats://host:port or tls://host:port, else raise ValueError."""
    url = urlsplit(value)
    try:
        sound = url.scheme in ("nats", "tls") and bool(url.hostname) and url.port is not None
    except ValueError:
        sound = False
    if url.username or url.password:
        # Not repeated: whatever stands there is a secret.
        raise ValueError(
            "credentials do not belong in an address, which others can read: name a file, nats_credentials"
        )
    if not sound or url.path.strip("/") or url.query or url.fragment:
        raise ValueError("must be nats://host:port or tls://host:port")
    return value
