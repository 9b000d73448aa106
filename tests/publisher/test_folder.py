"""Nothing is sent to a socket in this user's own folder if somebody else can have put it there."""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Timer

import pytest

from stream_monitor.publisher.backlog import Backlog
from stream_monitor.publisher.delivery import Delivery
from stream_monitor.publisher.log import Log
from stream_monitor.ring import RingReader
from stream_monitor.socket_folders import own_folder
from stream_monitor.target import Target
from tests.publisher.fakes import INFO, Monitor, Worker


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of this user's sockets, not made yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return own_folder()


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    """It listens in a folder of ours, which may come to stand where that of the user's sockets is looked for."""
    (tmp_path / "made").mkdir(mode=0o700)
    monitor = Monitor(f"unix:{tmp_path / 'made' / 'ingest.sock'}")
    monitor.start()
    yield monitor
    monitor.stop()


def accepted(monitor: Monitor, folder: Path, seconds: float) -> int:
    """How many summaries a publisher delivers there in a time."""
    worker = Worker()
    worker.step()

    async def deliver() -> None:
        backlog = Backlog(RingReader(worker.ring.fd))
        backlog.take()
        delivery = Delivery(backlog, INFO, Target(f"unix:{folder / 'ingest.sock'}"), Log("tp0 pp0"))
        delivery.finish()
        with suppress(TimeoutError):
            await asyncio.wait_for(delivery.run(), seconds)

    asyncio.run(deliver())
    worker.ring.close()
    return len(monitor.accepted)


def test_to_a_folder_of_ours_it_is_delivered(monitor: Monitor, folder: Path) -> None:
    (folder.parent / "made").rename(folder)
    assert accepted(monitor, folder, 20) == 1


@pytest.mark.parametrize("what", ["a stranger's", "a link", "open"])
def test_to_a_folder_that_others_may_use_nothing_is(
    monitor: Monitor, folder: Path, what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made, owner = folder.parent / "made", os.getuid()
    if what == "a stranger's":
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
        folder = own_folder()
        said = f"folder {folder} belongs to user {owner}, not to us ({owner + 1})"
    elif what == "a link":
        said = f"{folder} is not a folder (or a symbolic link to one)"
    else:
        made.chmod(0o777)
        said = f"folder {folder} is open to every user; it must be 0770 or stricter"
    if what == "a link":
        folder.symlink_to(made)
    else:
        made.rename(folder)
    assert accepted(monitor, folder, 0.3) == 0
    assert capfd.readouterr().err.splitlines() == [
        f"stream-monitor publisher tp0 pp0: cannot connect, will keep trying: {said}; have it removed, or name another "
        "socket: target, and ingest of the monitor"
    ]


def test_a_folder_that_is_not_there_is_not_left_to_whoever_makes_it(
    monitor: Monitor, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stream_monitor.publisher.delivery.LONGEST_WAIT", 0.1)
    made = folder.parent / "made"
    made.chmod(0o777)
    making = Timer(0.2, made.rename, (folder,))
    making.start()
    assert accepted(monitor, folder, 0.7) == 0
    making.join()
    unreachable, refused = capfd.readouterr().err.splitlines()
    assert unreachable.endswith(f"monitor at unix:{folder / 'ingest.sock'} unreachable, will keep trying")
    assert f"folder {folder} is open to every user" in refused
