"""What may happen to a monitor, and after each: nobody waited, no acknowledged event is lost, the rows add up, and all
goes on by itself. Stores that are damaged or full by SQLite's word are in tests/monitor/test_store_failures.py."""

import asyncio
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from stream_monitor.publisher import delivery
from stream_monitor.publisher.process import Publisher
from stream_monitor.ring import RingReader
from stream_monitor.target import Target
from tests.faults.proxy import Proxy
from tests.faults.world import EngineRank, World, info_of, world
from tests.monitor.conftest import until
from tests.monitor.process import free_port
from tests.monitor.test_store import stored

LONGEST_WRITE = 0.5
"""Seconds that a request may take to write under load; a worker that waited for a monitor would take many."""


@pytest.fixture
def one(tmp_path: Path) -> Iterator[World]:
    """A world with one engine."""
    with world(tmp_path) as made:
        made.rank()
        yield made


def timed(work: Callable[[], None]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def test_a_monitor_that_is_killed_mid_request(one: World) -> None:
    rank = one.ranks[0]
    for round in range(3):
        rank.request(f"a{round}-aaaaaaaa")
        one.wait_heard(f"a{round}")
        rank.begin(f"b{round}-aaaaaaaa")
        one.monitor.kill()
        rank.request(f"c{round}-aaaaaaaa")
        one.monitor.start()
        one.wait_heard(f"c{round}")
    one.settle()
    held = {event for (event,) in stored(one.monitor.store, "SELECT sequence FROM events")}
    assert len(held) == sum(one.heard.values()) == 6
    assert one.lost == 0


def test_a_monitor_that_hangs_and_goes_on(one: World) -> None:
    rank, process = one.ranks[0], one.monitor.process
    assert process is not None
    rank.request("before-aaaaaaaa")
    one.wait_heard("before")
    process.send_signal(signal.SIGSTOP)
    names = [f"r{n}" for n in range(20)]
    for name in names:
        assert timed(lambda name=name: rank.request(f"{name}-aaaaaaaa")) < LONGEST_WRITE
    process.send_signal(signal.SIGCONT)
    one.wait_heard("before", *names)
    one.settle()
    assert one.metric("stream_monitor_rows_total", outcome="dropped") == 0


def test_a_monitor_that_is_slow(one: World) -> None:
    """It gets a tenth of the time."""
    rank, slow = one.ranks[0], threading.Event()
    process = one.monitor.process
    assert process is not None

    def hinder() -> None:
        while not slow.is_set():
            process.send_signal(signal.SIGSTOP)
            slow.wait(0.09)
            process.send_signal(signal.SIGCONT)
            slow.wait(0.01)

    hindering = threading.Thread(target=hinder)
    hindering.start()
    names = [f"r{n}" for n in range(10)]
    try:
        for name in names:
            rank.request(f"{name}-aaaaaaaa")
    finally:
        slow.set()
        hindering.join()
    one.wait_heard(*names)
    one.settle()


def test_a_monitor_whose_disk_is_full(one: World) -> None:
    rank, process = one.ranks[0], one.monitor.process
    assert process is not None
    rank.request("before-aaaaaaaa")
    one.wait_heard("before")
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    for n in range(5):
        rank.request(f"full{n}-aaaaaaaa")
    one.wait_heard(*(f"full{n}" for n in range(5)))
    until(lambda: one.metric("stream_monitor_store_up") == 0)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
    until(lambda: one.metric("stream_monitor_store_up") == 1, 30)
    rank.request("after-aaaaaaaa")
    one.wait_heard("after")
    one.settle()
    until(lambda: stored(one.monitor.store, "SELECT count(*) FROM events") == [(7,)])


def test_a_monitor_that_gets_no_more_memory(one: World) -> None:
    """It refuses what it has no memory for, ends, or answers nobody: then a supervisor starts it again, by its liveness
    probe (deploy/kubernetes). All three are survived; which one it is hangs on whose allocation fails first."""
    rank, process = one.ranks[0], one.monitor.process
    assert process is not None
    rank.request("before-aaaaaaaa")
    one.wait_heard("before")
    used = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(process.pid, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    for n in range(30):
        rank.request(f"r{n}-aaaaaaaa")
    with suppress(AssertionError):
        until(lambda: process.poll() is not None or one.account_is_whole(), 15)
    if process.poll() is None and one.answers():
        resource.prlimit(process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        one.monitor.kill()
        one.monitor.start()
    rank.request("after-aaaaaaaa")
    one.wait_heard("before", "after")
    one.settle()


def test_an_engine_that_is_killed_and_starts_again_with_the_same_ids(one: World) -> None:
    first = one.ranks[0]
    first.request("same-aaaaaaaa")
    one.wait_heard("same")
    first.begin("running-aaaaaaaa")
    one.settle()
    first.die()
    one.heard.clear()
    second = one.rank()
    second.request("same-aaaaaaaa")
    second.request("running-aaaaaaaa")
    one.wait_heard("same", "running")
    one.settle()
    keys = [
        (info.key.engine_instance, info.external_id, info.rows_kept)
        for info in one.monitor.api.ListRequests(_all()).requests
    ]
    whole = 3 * 22
    assert sorted(keys) == sorted(
        [
            (first.synthetic.info.instance, "same", whole),
            (first.synthetic.info.instance, "running", 9),
            (second.synthetic.info.instance, "same", whole),
            (second.synthetic.info.instance, "running", whole),
        ]
    )


def _all() -> object:
    from stream_monitor.v1alpha1 import monitor_pb2

    return monitor_pb2.ListRequestsRequest()


class InThread:
    """The publisher's own code on a thread, so that its patience can be shortened."""

    def __init__(self, rank: EngineRank, target: str) -> None:
        self._life, self._death = os.pipe()

        async def publish() -> None:
            await Publisher(RingReader(rank.ring.fd), info_of(rank.synthetic.info), Target(target)).run(self._life)

        self._thread = threading.Thread(target=lambda: asyncio.run(publish()))
        self._thread.start()

    def stop(self) -> None:
        os.close(self._death)
        self._thread.join(20)
        os.close(self._life)


def test_a_connection_that_is_cut_off_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "ANSWER_SECONDS", 2.0)
    ingest = f"127.0.0.1:{free_port()}"
    with world(tmp_path, ingest=ingest) as made:
        proxy = Proxy(ingest)
        rank = EngineRank("unix:/nobody")
        rank.publisher.stop(0)
        made.ranks.append(rank)
        publisher = InThread(rank, proxy.address)
        try:
            rank.request("before-aaaaaaaa")
            made.wait_heard("before")
            proxy.silence()
            rank.request("meanwhile-aaaaaaaa")
            rank.request("after-aaaaaaaa")
            made.wait_heard("meanwhile", "after")
            assert proxy.connections >= 2
            made.settle()
            assert made.metric("stream_monitor_rows_total", outcome="dropped") == 0
            assert made.metric("stream_monitor_ranks_connected") == 1
        finally:
            publisher.stop()
            proxy.close()


@pytest.mark.long
def test_an_engine_whose_host_is_gone_without_a_word_is_not_taken_for_connected(tmp_path: Path) -> None:
    ingest = f"127.0.0.1:{free_port()}"
    with world(tmp_path, ingest=ingest) as made:
        proxy = Proxy(ingest)
        rank = EngineRank(proxy.address)
        made.ranks.append(rank)
        rank.request("before-aaaaaaaa")
        made.wait_heard("before")
        assert made.metric("stream_monitor_ranks_connected") == 1
        assert rank.publisher.pid is not None
        os.kill(rank.publisher.pid, signal.SIGSTOP)
        proxy.silence()
        until(lambda: made.metric("stream_monitor_ranks_connected") == 0, 60)
        os.kill(rank.publisher.pid, signal.SIGCONT)
        proxy.close()
