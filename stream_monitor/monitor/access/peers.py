"""Who is at the other end of a Unix socket: the kernel's word (SO_PEERCRED), beside the modes of folder and socket.

gRPC accepts connections by itself and does not say whose they are. A relay that accepts for it would copy every byte a
second time. But its sockets are descriptors of this process. So when a call begins, all connections to this socket are
looked at, and those of others are shut down. A call goes on only if its own connection was among them:

* the look comes after the call began, so its connection was accepted by then;
* one that was gone before the look, which somebody might hope for who sends and closes at once, has no call any more:
  whoever asks for the look sends the initial metadata after it (interceptor.py), which fails then. As of 1.85, gRPC
  keeps a descriptor while a call of it runs, so that the look finds it; but gRPC does not promise that.

One look costs some microseconds a descriptor, once a call; messages cost nothing.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Collection

_PEER_GROUPS = 59
"""SO_PEERGROUPS of Linux, which Python's socket module lacks."""
_GROUP_BYTES = 1024
"""The most that Python asks the kernel for. Somebody in more groups than fit is taken to be in none but the first."""
_CLOSING_SECONDS = 2.0
"""How long gRPC may take to close what was shut down."""

Credentials = tuple[int, int, int]
"""Process, user and group."""


class NotAllowed(Exception):
    """A connection to the socket was not of a user who may use it, and could not be told from the call's own."""


class Peers:
    """Checks those who connect to the Unix socket at `path`.

    Args:
        path: of the socket.
        users: who may connect; empty: our own user, root, and members of the socket's group.
        refused: told of each connection that is shut down.
    """

    def __init__(self, path: str, users: Collection[int] = (), refused: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self._refused = refused
        self._users = frozenset(users)
        self._group = os.stat(path).st_gid
        self._checked: set[str] = set()
        self._shut: set[str] = set()

    async def check(self) -> None:
        """Every connection is of somebody who may connect, once this returns. Raises NotAllowed."""
        deadline = asyncio.get_running_loop().time() + _CLOSING_SECONDS
        while self._shut_others():
            # What is shut down is still there until gRPC has noticed; until then a call might be of it.
            if asyncio.get_running_loop().time() > deadline:
                raise NotAllowed
            await asyncio.sleep(0.005)

    def may_connect(self, credentials: Credentials, groups: Collection[int]) -> bool:
        """Whether the kernel's word on a peer is good enough."""
        _, user, group = credentials
        if self._users:
            return user in self._users
        return user in (os.getuid(), 0) or self._group in (group, *groups)

    def _shut_others(self) -> bool:
        """Whether there is a connection of somebody who may not connect; it is shut down."""
        found: set[str] = set()
        shut: set[str] = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                link = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue  # Closed meanwhile.
            if not link.startswith("socket:"):
                continue
            (found if link in self._checked or self._is_fine(int(name)) else shut).add(link)
        for _ in shut - self._shut:
            self._refused()
        self._checked, self._shut = found, shut
        return bool(shut)

    def _is_fine(self, descriptor: int) -> bool:
        try:
            # Of a copy, so that all that is asked is of one and the same socket.
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            return True  # Closed meanwhile.
        with connection:
            if connection.family is not socket.AF_UNIX or connection.getsockname() != self.path:
                return True
            with contextlib.suppress(OSError):
                listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if listens or self.may_connect(*_peer(connection)):
                    return True
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        return False


def _peer(connection: socket.socket) -> tuple[Credentials, tuple[int, ...]]:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, group = struct.unpack("3i", raw)
    groups = b""
    with contextlib.suppress(OSError):
        groups = connection.getsockopt(socket.SOL_SOCKET, _PEER_GROUPS, _GROUP_BYTES)
    return (process, user, group), struct.unpack(f"{len(groups) // 4}i", groups)
