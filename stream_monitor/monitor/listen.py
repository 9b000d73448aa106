"""Where the monitor may listen, and how an address is taken without surprises."""

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from stream_monitor.addresses import is_local
from stream_monitor.socket_folders import folder_fault

FOLDER_MODE = 0o770
SOCKET_UMASK = 0o117
"""Leaves 0660: the user and the group of the monitor."""


class ListenError(Exception):
    """An address cannot be used. One line that names it and what to do."""


def check_exposure(name: str, address: str, allowed: bool) -> None:
    """Refuse what others on the network could reach, unless it is `allowed`: there is TLS, or the operator says so."""
    if not allowed and not is_local(address):
        raise ListenError(
            f"{name}: {address} is reachable from other hosts without TLS; use loopback, unix:, tls_certificate and "
            "tls_key, or --insecure"
        )


def prepare_unix(name: str, address: str) -> Path:
    """Make the socket's folder ours, remove a stale socket, and refuse one that is in use."""
    path = Path(address.removeprefix("unix:"))
    try:
        with suppress(FileExistsError):
            os.makedirs(path.parent, mode=FOLDER_MODE)
            os.chmod(path.parent, FOLDER_MODE)
        fault = folder_fault(path.parent)
    except OSError as error:
        raise ListenError(f"{name}: cannot make folder {path.parent}: {error.strerror}") from None
    if fault:
        raise ListenError(f"{name}: {fault}")
    try:
        held = os.lstat(path)
    except FileNotFoundError:
        return path
    if not stat.S_ISSOCK(held.st_mode):
        raise ListenError(f"{name}: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return path
        except OSError as error:
            raise ListenError(f"{name}: cannot tell whether {path} is in use: {error.strerror}") from None
    raise ListenError(f"{name}: {path} is in use by another process")


def bind_tcp(name: str, address: str) -> socket.socket:
    """A listening TCP socket.

    Bound alone it would not keep others out: two sockets may be bound to one port, and who listens last fails.
    """
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(where)
            bound.listen()
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ListenError(f"{name}: cannot listen on {address}: {error.strerror}") from None
    return bound
