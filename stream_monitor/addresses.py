"""Addresses as settings give them: `unix:/path` or `host:port`."""

import ipaddress
from contextlib import suppress


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
