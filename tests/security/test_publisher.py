"""The publisher's process against a monitor that asks who is there."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from stream_monitor.config import CaptureSettings, SettingsError, load
from stream_monitor.publisher.launch import PublisherProcess
from stream_monitor.target import Target, TargetError
from tests.publisher.fakes import INFO, Worker
from tests.security.guarded import SCRAPER, Files, Guarded, expired, principal, token_of, wait_until

ACCESS = SCRAPER + principal("engine", publish="*")
ACCEPTED = {"outcome": "accepted"}
MESSAGES = "stream_monitor_messages_total"


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.ring.close()


class Heard:
    """What the publisher's process said so far."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.text = ""
        self._capfd = capfd

    def has(self, text: str) -> bool:
        self.text += self._capfd.readouterr().err
        return text in self.text


@pytest.fixture
def heard(capfd: pytest.CaptureFixture[str]) -> Heard:
    return Heard(capfd)


class Publishing:
    """A publisher's process, with the files of a target that a test may replace."""

    def __init__(self, worker: Worker, address: str, folder: Path, ca: trustme.CA) -> None:
        self.ca, self.token = folder / "monitor-ca.crt", folder / "token"
        self.ca.write_bytes(ca.cert_pem.bytes())
        self.token.write_text(token_of("engine"))
        self.client = Files(folder / "client")
        self.worker, self._address = worker, address
        self._process: PublisherProcess | None = None

    def start(self, mutual: bool = False) -> None:
        shown = (str(self.client.certificate), str(self.client.key)) if mutual else ("", "")
        target = Target(self._address, str(self.ca), *shown, token_file=str(self.token))
        self._process = PublisherProcess(self.worker.ring.fd, INFO, target)
        self._process.start()
        self.worker.step()

    @property
    def pid(self) -> int:
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


@pytest.fixture
def publishing(
    start: Callable[..., Guarded], worker: Worker, files: Files, tmp_path: Path, ca: trustme.CA
) -> Iterator[Callable[..., tuple[Guarded, Publishing]]]:
    made: list[Publishing] = []

    def make(**settings: object) -> tuple[Guarded, Publishing]:
        monitor = start(ACCESS, files, ingest="localhost:0", **settings)
        made.append(Publishing(worker, monitor.server.ingest_address, tmp_path, ca))
        return monitor, made[-1]

    yield make
    for each in made:
        each.stop()


def test_it_speaks_tls_with_a_token(publishing: Callable[..., tuple[Guarded, Publishing]]) -> None:
    monitor, publisher = publishing()
    publisher.start()
    wait_until(lambda: monitor.metric(MESSAGES, **ACCEPTED) > 0)
    command = Path(f"/proc/{publisher.pid}/cmdline").read_bytes() + Path(f"/proc/{publisher.pid}/environ").read_bytes()
    assert str(publisher.token).encode() in command
    assert token_of("engine").encode() not in command


def test_it_shows_a_certificate_and_takes_a_replaced_one(
    publishing: Callable[..., tuple[Guarded, Publishing]], ca: trustme.CA, heard: Heard
) -> None:
    monitor, publisher = publishing(mutual=True)
    publisher.client.put(expired(ca, "engine@example.org"))
    publisher.start(mutual=True)
    wait_until(lambda: heard.has("unreachable"))
    assert monitor.metric(MESSAGES, **ACCEPTED) == 0
    publisher.client.put(ca.issue_cert("engine@example.org"))
    wait_until(lambda: monitor.metric(MESSAGES, **ACCEPTED) > 0)


def test_a_wrong_ca_is_named_and_a_right_one_is_taken(
    publishing: Callable[..., tuple[Guarded, Publishing]],
    ca: trustme.CA,
    other_ca: trustme.CA,
    heard: Heard,
) -> None:
    monitor, publisher = publishing()
    publisher.ca.write_bytes(other_ca.cert_pem.bytes())
    publisher.start()
    wait_until(lambda: heard.has("CERTIFICATE_VERIFY_FAILED"))
    publisher.ca.write_bytes(ca.cert_pem.bytes())
    wait_until(lambda: monitor.metric(MESSAGES, **ACCEPTED) > 0)


def test_a_token_that_was_not_known_is_tried_again_with_what_the_file_holds_then(
    publishing: Callable[..., tuple[Guarded, Publishing]], heard: Heard
) -> None:
    monitor, publisher = publishing()
    publisher.token.write_text(token_of("stranger"))
    publisher.start()
    wait_until(lambda: heard.has("UNAUTHENTICATED the token is nobody's who has access"))
    assert monitor.refused("grpc", "unknown_token") > 0
    publisher.token.unlink()
    wait_until(lambda: heard.has(f"cannot connect, will keep trying: cannot read {publisher.token}"))
    publisher.token.write_text(token_of("engine") + "\n")
    wait_until(lambda: monitor.metric(MESSAGES, **ACCEPTED) > 0)
    assert token_of("stranger") not in heard.text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target": "192.0.2.1:9752"}, "would be spoken to in the clear"),
        ({"target": "monitor:9752"}, "would be spoken to in the clear"),
        ({"target": "monitor:9752", "target_token_file": "t", "target_insecure": True}, "a token is not sent there"),
        ({"target": "monitor:9752", "target_ca": "c", "target_key": "k"}, "a key its certificate"),
        ({"target": "monitor:9752", "target_certificate": "c", "target_key": "k"}, "shown over TLS"),
        ({"target": "monitor:9752", "target_insecure": True}, ""),
        ({"target": "monitor:9752", "target_ca": "c", "target_token_file": "t"}, ""),
        ({"target": "127.0.0.1:9752", "target_token_file": "t"}, ""),
        ({"target": "unix:/run/i.sock", "target_token_file": "t"}, ""),
    ],
)
def test_settings_that_would_publish_in_the_clear_are_refused(settings: dict[str, object], says: str) -> None:
    if not says:
        assert load(CaptureSettings, **settings).monitor().address == settings["target"]
        return
    with pytest.raises(SettingsError, match=says) as raised:
        load(CaptureSettings, **settings)
    assert str(raised.value).startswith("target: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "two words", "täglich-ein-neues", "x" * 5000])
def test_a_file_that_holds_no_token_is_named_and_not_quoted(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(TargetError) as raised:
        Target("unix:/nobody", token_file=str(path)).metadata()
    assert str(raised.value) == f"{path} holds no token: one line of printable characters without spaces"
    os.unlink(path)
    with pytest.raises(TargetError, match="cannot read"):
        Target("unix:/nobody", token_file=str(path)).metadata()
