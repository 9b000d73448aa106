"""The publisher as a process of its own, against a real gRPC server, with every kind of monitor."""

import contextlib
import glob
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import msgspec
import psutil
import pytest

from stream_monitor.publisher import launch
from stream_monitor.publisher.backlog import WAITING_BYTES, WINDOW_ENTRIES
from stream_monitor.publisher.launch import PublisherProcess
from stream_monitor.ring import MEMORY_NAME
from stream_monitor.target import Target
from tests.publisher.fakes import INFO, Monitor, Worker, check_ledger, wait_until

HEADS = INFO.heads_per_row


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    monitor = Monitor(f"unix:{tmp_path / 'ingest.sock'}")
    monitor.start()
    yield monitor
    monitor.stop()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.ring.close()


@pytest.fixture
def publisher(worker: Worker, monitor: Monitor) -> Iterator[PublisherProcess]:
    publisher = PublisherProcess(worker.ring.fd, INFO, Target(monitor.address))
    publisher.start()
    yield publisher
    publisher.stop(0)
    assert publisher.pid is not None
    assert not psutil.pid_exists(publisher.pid)


def test_everything_arrives_in_order_and_the_ledger_counts_it(
    worker: Worker, monitor: Monitor, publisher: PublisherProcess
) -> None:
    for _ in range(300):
        worker.step()
    worker.finish()
    publisher.stop(15)
    assert sorted(monitor.accepted) == list(range(1, 302))
    first = monitor.accepted[1]
    assert (first.schema_version, first.engine.instance, first.step) == (2, INFO.instance, 1)
    assert (first.rows.count, first.started[0].prompt_tokens, len(first.rows.narrow_block_ids)) == (
        4,
        10,
        4 * HEADS * 2 * 2,
    )
    assert monitor.accepted[301].finished[0].total_tokens == 910
    assert monitor.accepted[301].step == 0
    assert not monitor.accepted[301].HasField("rows")
    tokens, chunks = check_ledger(monitor, worker)
    assert tokens == {"expected": 1500 * HEADS, "captured": 900 * HEADS, "sampled_out": 600 * HEADS}
    assert chunks == {"expected": 300 * HEADS, "captured": 300 * HEADS}


def test_each_summary_is_true_when_it_is_sent(worker: Worker, monitor: Monitor, publisher: PublisherProcess) -> None:
    monitor.verdict = lambda summary: "quota" if summary.sequence % 3 == 0 else None
    for _ in range(50):
        worker.step()
    publisher.stop(15)
    for summary in monitor.accepted.values():
        counts = {(c.outcome, c.reason): c.count for c in summary.ledger.token_rows}
        assert counts["expected", ""] == sum(counts.values()) - counts["expected", ""]


def test_a_refusal_is_counted_and_a_last_one_is_corrected_without_rows(
    worker: Worker, monitor: Monitor, publisher: PublisherProcess
) -> None:
    monitor.verdict = lambda summary: "quota" if summary.sequence in (2, 5) else None
    for _ in range(5):
        worker.step()
    wait_until(lambda: 6 in monitor.accepted)
    assert (monitor.accepted[6].step, monitor.accepted[6].rows.count) == (0, 0)
    tokens, chunks = check_ledger(monitor, worker)
    assert (tokens["refused/quota"], chunks["refused/quota"]) == (6 * HEADS, 2 * HEADS)
    worker.step()  # and the numbering goes on
    wait_until(lambda: 7 in monitor.accepted)
    check_ledger(monitor, worker)


@pytest.mark.parametrize(
    "status",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.INTERNAL,
    ],
)
def test_a_summary_that_ends_the_stream_is_refused_and_the_others_arrive(
    worker: Worker, monitor: Monitor, publisher: PublisherProcess, status: grpc.StatusCode
) -> None:
    monitor.verdict = lambda summary: status if summary.sequence == 3 else None
    for _ in range(8):
        worker.step()
    worker.step()
    wait_until(lambda: len(monitor.accepted) >= 8)
    wait_until(lambda: max(monitor.accepted) == 9)
    assert 3 not in monitor.accepted
    time.sleep(0.1)
    publisher.stop(15)
    tokens, _ = check_ledger(monitor, worker)
    assert tokens[f"refused/monitor_{status.name.lower()}"] == 3 * HEADS


def test_a_monitor_that_restarts_gets_what_it_missed_and_nothing_twice(
    worker: Worker, monitor: Monitor, publisher: PublisherProcess
) -> None:
    for due in (60, 120, 180):
        for _ in range(40):
            worker.step()
        wait_until(lambda due=due: len(monitor.accepted) > due - 60)
        monitor.stop()
        for _ in range(20):
            worker.step()
        monitor.start()
        wait_until(lambda due=due: len(monitor.accepted) == due)
    publisher.stop(15)
    assert sorted(monitor.accepted) == list(range(1, 181))
    tokens, _ = check_ledger(monitor, worker)
    assert not any(key.startswith(("dropped", "refused")) for key in tokens)


def test_a_hung_monitor_costs_bounded_memory_and_every_loss_is_counted(
    worker: Worker, monitor: Monitor, publisher: PublisherProcess
) -> None:
    worker.step()
    wait_until(lambda: 1 in monitor.accepted)
    assert publisher.pid is not None
    process = psutil.Process(publisher.pid)
    before = process.memory_info().rss
    monitor.hang.set()
    for _ in range(240):  # 60 MB, in a ring of 1 MiB, read as it comes
        for _ in range(4):
            worker.step(padding=65_000)
        time.sleep(0.004)
    grown = process.memory_info().rss - before
    assert grown < 40 << 20
    monitor.hang.clear()
    wait_until(lambda: max(monitor.accepted) >= worker.steps)
    publisher.stop(15)
    tokens, _ = check_ledger(monitor, worker)
    assert tokens["dropped/monitor_unreachable"] > 0


def test_lifecycle_of_dropped_rows_still_arrives(monitor: Monitor) -> None:
    # All of the steps fit into the ring, however slowly it is read, and not into the publisher and half the ring.
    worker = Worker(capacity=12 << 20)
    publisher = PublisherProcess(worker.ring.fd, INFO, Target(monitor.address))
    publisher.start()
    worker.step()
    wait_until(lambda: 1 in monitor.accepted)
    monitor.stop()
    while worker.steps < 9_000:
        worker.step()
    worker.finish()
    wait_until(lambda: rests(publisher))
    monitor.start()
    wait_until(lambda: max(monitor.accepted) >= worker.steps + 1)
    publisher.stop(15)
    tokens, _ = check_ledger(monitor, worker)
    worker.ring.close()
    assert tokens["dropped/monitor_unreachable"] > 0
    assert tokens["dropped/ring_full"] == 0
    assert monitor.positions() == list(range(10, 10 + 3 * worker.steps))
    assert sum(len(summary.finished) for summary in monitor.accepted.values()) == 1


def rests(publisher: PublisherProcess) -> bool:
    """Whether it has read what there was: all that it does for half a second is to look."""
    process = psutil.Process(publisher.pid)
    before = process.cpu_times()
    time.sleep(0.5)
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system <= 0.05


def test_a_ring_that_overflows_is_counted_to_the_row(worker: Worker, monitor: Monitor) -> None:
    for _ in range(3000):
        worker.step()
    publisher = PublisherProcess(worker.ring.fd, INFO, Target(monitor.address))
    publisher.start()
    publisher.stop(45)
    tokens, chunks = check_ledger(monitor, worker)
    assert tokens["dropped/ring_full"] == 3 * chunks["dropped/ring_full"] > 0
    assert max(monitor.accepted) == 3000


@pytest.mark.parametrize("last", [True, False])
def test_a_record_that_cannot_be_read_is_counted(
    worker: Worker, monitor: Monitor, publisher: PublisherProcess, last: bool
) -> None:
    worker.step()
    worker.step(payload=b"\xc1 not msgpack")
    if not last:
        worker.step()
    publisher.stop(15)
    tokens, chunks = check_ledger(monitor, worker) if not last else monitor.ledger()
    assert (tokens["dropped/torn"], chunks["dropped/torn"]) == (3 * HEADS, HEADS)
    assert tokens["expected"] == sum(tokens.values()) - tokens["expected"]


def test_a_publisher_that_is_killed_is_replaced_and_nothing_is_lost_or_counted_twice(
    worker: Worker, monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "FIRST_RESTART", 0.05)
    publisher = PublisherProcess(worker.ring.fd, INFO, Target(monitor.address))
    publisher.start()
    monitor.verdict = lambda summary: "quota" if summary.sequence == 4 else None

    def rows_received() -> int:
        return sum(summary.rows.count > 0 for summary in list(monitor.accepted.values()))

    for restarts in (1, 2, 3):
        for _ in range(60):
            worker.step()
        wait_until(lambda: rows_received() > 0)
        assert publisher.pid is not None
        os.kill(publisher.pid, signal.SIGKILL)
        for _ in range(10):
            worker.step()
        wait_until(lambda restarts=restarts: publisher.poll() and publisher.restarts == restarts)
        wait_until(lambda restarts=restarts: rows_received() == 70 * restarts - 1)
    publisher.stop(15)
    tokens, _ = check_ledger(monitor, worker)
    assert tokens["refused/quota"] == 3 * HEADS
    assert not any(key.startswith("dropped") for key in tokens)


def test_what_was_sent_and_what_waits_is_told_and_outlives_the_publisher(
    worker: Worker, monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "FIRST_RESTART", 0.05)
    monitor.verdict = lambda summary: grpc.StatusCode.UNAVAILABLE if summary.sequence not in monitor.accepted else None
    publisher = PublisherProcess(worker.ring.fd, INFO, Target(monitor.address))
    publisher.start()
    steps = WINDOW_ENTRIES + 40  # more than are on their way at a time
    for _ in range(steps):
        worker.step()
    wait_until(lambda: monitor.answers["UNAVAILABLE"] > 1)
    assert publisher.pid is not None
    os.kill(publisher.pid, signal.SIGKILL)
    wait_until(lambda: publisher.poll() and publisher.restarts == 1)
    monitor.verdict = lambda summary: None
    wait_until(lambda: steps in monitor.accepted)
    publisher.stop(15)
    told = [monitor.accepted[sequence].ledger for sequence in sorted(monitor.accepted)]
    assert [ledger.sent for ledger in told] == sorted({ledger.sent for ledger in told})
    assert told[-1].sent >= steps + monitor.answers["UNAVAILABLE"]
    for ledger in told:
        queues = {queue.name: queue for queue in ledger.queues}
        assert queues["ring"].capacity == 1 << 20
        assert queues["backlog"].capacity == WAITING_BYTES
        assert all(queue.size <= queue.capacity for queue in queues.values())
    # While the first of them were sent, the others waited.
    assert max(queue.size for ledger in told for queue in ledger.queues if queue.name == "backlog") > 0


def test_one_that_cannot_be_started_is_told_once_and_tried_again(
    worker: Worker, monitor: Monitor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "FIRST_RESTART", 0.01)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM, if it is imported, may have ended that.
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/nowhere/python")
        publisher = PublisherProcess(worker.ring.fd, INFO, Target(monitor.address))
    publisher.start()
    worker.step()
    wait_until(lambda: publisher.poll() or publisher.restarts == 3)
    assert publisher.trouble == "the publisher cannot be started: No such file or directory"
    (record,) = caplog.records
    assert "cannot be started (/nowhere/python: No such file" in record.getMessage()
    publisher._command[0] = sys.executable
    wait_until(publisher.poll)
    assert publisher.trouble == ""
    assert caplog.records[-1].getMessage() == "Stream Monitor: the publisher runs"
    publisher.stop(15)
    check_ledger(monitor, worker)
    assert 1 in monitor.accepted


def test_interrupts_leave_it_running(worker: Worker, monitor: Monitor, publisher: PublisherProcess) -> None:
    worker.step()
    wait_until(lambda: 1 in monitor.accepted)
    assert publisher.pid is not None
    os.kill(publisher.pid, signal.SIGINT)
    os.kill(publisher.pid, signal.SIGTERM)
    worker.step()
    wait_until(lambda: 2 in monitor.accepted)
    assert publisher.poll()
    assert publisher.restarts == 0


def test_it_runs_on_the_cpus_it_is_given_and_sleeps_when_idle(worker: Worker, monitor: Monitor) -> None:
    cpu = max(os.sched_getaffinity(0))
    publisher = PublisherProcess(worker.ring.fd, INFO, Target(monitor.address), cpus={cpu})
    publisher.start()
    worker.step()
    wait_until(lambda: 1 in monitor.accepted)
    assert publisher.pid is not None
    threads = psutil.Process(publisher.pid).threads()
    assert all(os.sched_getaffinity(thread.id) == {cpu} for thread in threads)
    time.sleep(0.5)
    before = sum(psutil.Process(publisher.pid).cpu_times()[:2])
    time.sleep(1)
    assert sum(psutil.Process(publisher.pid).cpu_times()[:2]) - before < 0.05
    publisher.stop(15)


def holders(device: int, inode: int) -> set[int]:
    """Processes that hold the ring's memory. By inode, because others on this machine may have rings of their own."""
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if f"memfd:{MEMORY_NAME}" in os.readlink(link):
                status = os.stat(link)
                if (status.st_dev, status.st_ino) == (device, inode):
                    found.add(int(link.split("/")[2]))
    return found


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("publisher_too", [False, True])
def test_a_worker_killed_outright_leaves_no_process_and_no_memory(monitor: Monitor, publisher_too: bool) -> None:
    script = f"""
        import os, time
        from stream_monitor.publisher.launch import PublisherProcess
        from stream_monitor.target import Target
        from tests.publisher.fakes import INFO, Worker
        worker = Worker()
        publisher = PublisherProcess(worker.ring.fd, INFO, Target({monitor.address!r}))
        publisher.start()
        status = os.fstat(worker.ring.fd)
        print(publisher.pid, status.st_dev, status.st_ino, flush=True)
        for _ in range(500):
            worker.step()
        print("written", flush=True)
        time.sleep(60)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    pid, *memory = map(int, child.stdout.readline().split())
    assert child.stdout.readline() == "written\n"
    assert holders(*memory) == {child.pid, pid}
    if publisher_too:
        wait_until(lambda: 1 in monitor.accepted)
        os.kill(pid, signal.SIGKILL)
    child.kill()
    child.wait()
    wait_until(lambda: gone(pid))
    assert holders(*memory) == set()
    if not publisher_too:
        assert sorted(monitor.accepted) == list(range(1, 501))
    _, errors = child.communicate()
    assert errors == ""


def test_a_publisher_that_is_given_no_ring_says_so_in_one_line() -> None:
    command = [sys.executable, "-m", "stream_monitor.publisher", "--ring-fd", "0"]
    command += ["--target", '{"address": "unix:/nobody"}']
    ended = subprocess.run(command, input=msgspec.json.encode(INFO) + b"\n", capture_output=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == b"stream-monitor publisher: file descriptor 0 is not a ring\n"


def test_a_missing_monitor_is_mentioned_once(worker: Worker, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    publisher = PublisherProcess(worker.ring.fd, INFO, Target(f"unix:{tmp_path}/nobody.sock"))
    publisher.start()
    worker.step()
    time.sleep(2.6)
    publisher.stop(15)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        f"monitor at unix:{tmp_path}/nobody.sock unreachable, will keep trying",
        "ends with summaries that the monitor never answered",
    ]
