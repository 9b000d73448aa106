"""Unix sockets: who is at the other end, by the kernel's word."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from stream_monitor.monitor.access.peers import Peers
from stream_monitor.v1alpha1 import ingest_pb2
from tests.monitor.conftest import TIMEOUT
from tests.monitor.synthetic import Engine
from tests.security.guarded import Guarded, code_of
from tests.security.http2 import fire_and_forget, publishing

NOBODY = 65534
MESSAGES = "stream_monitor_messages_total"


def attack(path: str, raw: bytes, times: int) -> None:
    """Connections that are gone as soon as they have sent what they came for, or soon after; the last one stays until
    it is shut down."""
    for number in range(times):
        with contextlib.suppress(OSError):  # Shut down while it sent.
            fire_and_forget(path, raw, wait=(number % 4) * 0.0005)
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError):
        connection.settimeout(TIMEOUT)
        connection.connect(path)
        connection.sendall(raw)
        while connection.recv(4096):
            continue


def publish_request() -> bytes:
    return ingest_pb2.PublishRequest(summary=Engine().summary()).SerializeToString()


def test_another_user_gets_nothing_in_however_short_its_connections_are(start: Callable[..., Guarded]) -> None:
    """Without the check some of these messages are taken in: seen with `peers` left out."""
    monitor = start(socket_uids=str(os.getuid() + 1))
    path = monitor.server.ingest_address.removeprefix("unix:")
    attack(path, publishing(publish_request()), 200)
    ended = code_of(lambda: monitor.tell([Engine().summary()]))
    assert ended in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert monitor.metric(MESSAGES) == 0
    assert monitor.refused("grpc", "unix_peer") > 0
    # TCP, beside it, goes by other rules.
    assert monitor.get("/api/requests").json() == {}


def test_the_right_user_is_served_while_others_try(start: Callable[..., Guarded]) -> None:
    """The one who tries is another user for whom the modes were opened by mistake."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    monitor = start()
    path = Path(monitor.server.ingest_address.removeprefix("unix:"))
    opened = [path, *path.parents]
    before = {each: each.stat().st_mode for each in opened}
    try:
        for each in opened:
            each.chmod(before[each] | 0o007)
        script = (
            f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
            "from tests.security.test_peers import attack, publish_request, publishing\n"
            f"attack({str(path)!r}, publishing(publish_request()), 150)"
        )
        # What it needs is imported first: another user may not read our files.
        script = f"import tests.security.test_peers, encodings.idna\n{script}"
        attacker = subprocess.Popen([sys.executable, "-c", script])
        rank, taken = Engine(), 0
        while attacker.poll() is None:
            (answer,) = monitor.tell([rank.summary()])
            assert answer.outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED
            taken += 1
        assert attacker.returncode == 0
        taken += len(monitor.tell([rank.summary()]))
    finally:
        for each in opened:
            each.chmod(before[each])
    assert monitor.metric(MESSAGES) == taken
    assert monitor.refused("grpc", "unix_peer") > 0


def test_who_may_connect(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.touch()
    group, user = path.stat().st_gid, os.getuid()
    peers = Peers(str(path))
    assert peers.may_connect((1, user, group + 7), ())
    assert peers.may_connect((1, 0, group + 7), ())
    assert peers.may_connect((1, user + 7, group), ())
    assert peers.may_connect((1, user + 7, group + 7), (group,))
    assert not peers.may_connect((1, user + 7, group + 7), (group + 8,))
    listed = Peers(str(path), [user + 7])
    assert listed.may_connect((1, user + 7, group + 7), ())
    assert not listed.may_connect((1, user, group), (group,))
