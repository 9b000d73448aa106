"""The commands against a monitor that speaks TLS and asks for a token: real processes, as an operator types them."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from tests.monitor.synthetic import Engine
from tests.monitor.test_service import SHIFTING
from tests.security.guarded import EVERYTHING, SCRAPER, Files, Guarded, principal, token_of, wait_until

ACCESS = SCRAPER + principal("all", **EVERYTHING) + principal("reader", subscribe="*")
WAIT = 60


class Commands:
    """Command lines on behalf of a principal, beside a monitor that holds a request."""

    def __init__(self, monitor: Guarded, folder: Path, ca: trustme.CA) -> None:
        self.monitor = monitor
        self._ca, self._token = folder / "ca.crt", folder / "token"
        self._ca.write_bytes(ca.cert_pem.bytes())
        monitor.tell(Engine().request("chatcmpl-r-aaaaaaaa", SHIFTING), "all")

    def line(self, name: str, *words: str, tls: bool = True) -> list[str]:
        self._token.write_text(token_of(name))
        how = ["--target", self.monitor.server.grpc_address, "--token-file", str(self._token)]
        return [sys.executable, "-m", "stream_monitor", *words, *how, *(["--ca", str(self._ca)] if tls else [])]

    def end(self, name: str, *words: str, tls: bool = True) -> tuple[int, str, str]:
        """Status, output, errors."""
        done = subprocess.run(self.line(name, *words, tls=tls), capture_output=True, text=True, timeout=WAIT)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def commands(start: Callable[..., Guarded], files: Files, ca: trustme.CA, tmp_path: Path) -> Commands:
    return Commands(start(ACCESS, files), tmp_path, ca)


def test_watch_explain_and_delete(commands: Commands) -> None:
    status, shown, errors = commands.end("reader", "explain", "chatcmpl-r")
    assert (status, errors) == (0, "")
    assert "findings" in shown
    status, shown, errors = commands.end("reader", "delete", "chatcmpl-r")
    assert (status, shown) == (2, "")
    assert errors.endswith("refused: reader does not have the right delete\n")
    assert errors.count("\n") == 1
    status, shown, _ = commands.end("all", "delete", "chatcmpl-r")
    assert (status, shown.startswith("deleted chatcmpl-r-aaaaaaaa of engine ")) == (0, True)


def test_watch_follows(commands: Commands) -> None:
    monitor, line = commands.monitor, commands.line("reader", "watch", "--json", "--all")
    watching = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert watching.stdout is not None
        wait_until(lambda: monitor.server.log.subscribers, "it subscribes")
        monitor.tell(Engine().request("chatcmpl-last-aaaaaaaa", [4]), "all")
        while json.loads(watching.stdout.readline())["external_id"] != "chatcmpl-last":
            continue
    finally:
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=WAIT)
    assert errors == ""


def test_in_the_clear_to_a_port_of_tls(commands: Commands) -> None:
    status, shown, errors = commands.end("all", "explain", "chatcmpl-r", tls=False)
    assert (status, shown) == (2, "")
    assert errors.startswith("stream-monitor: no monitor at localhost:")
    assert errors.count("\n") == 1


def test_calibrate_reads_what_it_may(commands: Commands, tmp_path: Path) -> None:
    status, shown, errors = commands.end("reader", "calibrate", "--out", str(tmp_path / "profile.json"))
    assert (status, errors) == (0, ""), errors
    assert "1 requests" in shown
