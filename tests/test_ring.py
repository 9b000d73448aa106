"""The ring: every record is either read intact or counted lost, to the row, whatever dies or lags."""

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_monitor import ring
from stream_monitor.ring import MEMORY_NAME, Mark, Record, RingError, RingReader, RingWriter

PAGE = 4096


@pytest.fixture
def writer():
    writer = RingWriter(PAGE)
    yield writer
    writer.close()


def read_all(reader: RingReader) -> list[Record]:
    return list(iter(reader.read, None))


def test_records_come_out_as_they_went_in(writer: RingWriter) -> None:
    reader = RingReader(writer.fd)
    assert reader.read() is None
    assert writer.write(b"one", 10, 1)
    assert writer.write(b"", 10, 3)
    first, second = read_all(reader)
    assert (first.payload, first.mark.sequence, first.token_rows, first.chunk_rows) == (b"one", 1, 10, 1)
    assert (second.payload, second.mark.sequence, second.token_rows, second.chunk_rows) == (b"", 2, 0, 2)
    assert (second.lost_records, second.lost_token_rows, second.lost_chunk_rows, second.torn) == (0, 0, 0, False)
    assert reader.written() == reader.mark == second.mark


def test_a_full_ring_loses_the_oldest_and_the_reader_knows_how_much(writer: RingWriter) -> None:
    reader = RingReader(writer.fd)
    for number in range(1, 101):
        writer.write(bytes([number]) * 1000, token_rows=7 * number, chunk_rows=number)
    records = read_all(reader)
    assert [record.payload[0] for record in records] == [98, 99, 100]
    assert (records[0].lost_records, records[0].lost_token_rows, records[0].lost_chunk_rows) == (97, 7 * 97, 97)
    assert (records[1].lost_records, records[1].lost_token_rows) == (0, 0)


def test_a_record_larger_than_the_ring_is_refused(writer: RingWriter) -> None:
    assert writer.write(b"kept", 1)
    assert not writer.write(bytes(PAGE), 2)
    assert writer.write(bytes(PAGE - 48), 3)
    (record,) = read_all(RingReader(writer.fd))
    assert (len(record.payload), record.token_rows, record.lost_records, record.lost_token_rows) == (PAGE - 48, 2, 1, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=60))
def test_any_sizes_any_lag(steps: list[tuple[int, int, int, bool]]) -> None:
    writer = RingWriter(PAGE)
    reader = RingReader(writer.fd)
    tokens = chunks = 0
    sent: dict[int, tuple[bytes, int, int]] = {}
    got: list[Record] = []
    for size, more_tokens, more_chunks, read in steps:
        tokens, chunks = tokens + more_tokens, chunks + more_chunks
        payload = os.urandom(size)
        assert writer.write(payload, tokens, chunks)
        sent[writer.sequence] = (payload, more_tokens, more_chunks)
        if read:
            got += read_all(reader)
    got += read_all(reader)
    writer.close()
    reader.close()
    for record in got:
        assert sent[record.mark.sequence] == (record.payload, record.token_rows, record.chunk_rows)
    assert sum(record.lost_records for record in got) + len(got) == len(sent)
    assert sum(record.token_rows + record.lost_token_rows for record in got) == tokens
    assert sum(record.chunk_rows + record.lost_chunk_rows for record in got) == chunks


def test_a_reader_that_takes_over_continues_where_the_last_commit_was(writer: RingWriter) -> None:
    reader = RingReader(writer.fd)
    for number in range(1, 6):
        writer.write(bytes([number]), number)
    marks = [record.mark for record in read_all(reader)]
    reader.commit(marks[0], b"first")
    reader.commit(marks[2], b"third")
    successor = RingReader(writer.fd)
    assert successor.state == b"third"
    assert [record.payload[0] for record in read_all(successor)] == [4, 5]


def test_a_commit_cut_short_leaves_the_one_before(writer: RingWriter) -> None:
    reader = RingReader(writer.fd)
    writer.write(b"x")
    (record,) = read_all(reader)
    reader.commit(record.mark, b"whole")
    reader.commit(Mark(0, 9, 9, 9), b"half")
    slot = ring._SLOTS[reader._generation % 2]
    reader._bytes[slot + 8] ^= 0xFF
    successor = RingReader(writer.fd)
    assert (successor.state, successor.mark) == (b"whole", record.mark)
    with pytest.raises(ValueError, match="exceeds"):
        reader.commit(record.mark, bytes(ring.STATE_BYTES + 1))


def test_a_damaged_record_is_waited_for_then_counted(writer: RingWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_TORN_SECONDS", 0.02)
    reader = RingReader(writer.fd)
    writer.write(b"damaged", 5)
    writer.write(b"good", 6)
    writer._data[50] ^= 0xFF
    assert reader.read() is None
    writer._data[50] ^= 0xFF
    record = reader.read()
    assert record is not None
    assert (record.payload, record.torn) == (b"damaged", False)
    writer.write(b"damaged again", 9)
    writer.write(b"good again", 10)
    writer._data[64 + 64 + 50] ^= 0xFF
    assert reader.read() == Record(b"good", Mark(128, 2, 6, 0), 1, 0, 0, 0, 0, False)
    assert reader.read() is None
    time.sleep(0.03)
    assert reader.read() == Record(b"good again", Mark(256, 4, 10, 0), 1, 0, 1, 3, 0, True)


def test_a_wrong_length_loses_what_is_behind_it_but_is_counted(
    writer: RingWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "_TORN_SECONDS", 0.0)
    reader = RingReader(writer.fd)
    writer.write(b"a", 5)
    writer.write(b"b", 6)
    writer._data[3] = 0xFF
    assert reader.read() is None
    writer._data[3] = 0
    writer.write(b"c", 7)
    record = reader.read()
    assert record is not None
    assert (record.payload, record.lost_records, record.lost_token_rows, record.torn) == (b"c", 2, 6, True)


def test_the_rest_stays_readable_after_close(writer: RingWriter) -> None:
    reader = RingReader(writer.fd)
    assert not reader.closed_by_writer
    writer.write(b"last")
    writer.close()
    writer.close()
    assert reader.closed_by_writer
    assert [record.payload for record in read_all(reader)] == [b"last"]


def open_rings() -> int:
    """Descriptors of rings in this process: the writer's own, and one in each mapping."""
    gc.collect()
    links = [entry.path for entry in os.scandir("/proc/self/fd")]
    return sum(MEMORY_NAME in os.readlink(link) for link in links if os.path.lexists(link))


def test_all_memory_is_reserved_at_once(writer: RingWriter) -> None:
    status = os.fstat(writer.fd)
    assert status.st_blocks * 512 >= status.st_size > PAGE


def test_the_memory_is_let_go_when_both_ends_close() -> None:
    before = open_rings()
    writer = RingWriter(PAGE)
    reader = RingReader(writer.fd)
    assert open_rings() == before + 3
    writer.close()
    assert open_rings() == before + 1
    reader.close()
    assert open_rings() == before


def test_the_ring_reaches_only_who_is_given_it(writer: RingWriter) -> None:
    assert not os.get_inheritable(writer.fd)
    listing = (
        "import os; print([os.readlink(entry) for entry in os.scandir('/proc/self/fd') if os.path.lexists(entry)])"
    )
    child = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, close_fds=False)
    assert "pipe:" in child.stdout
    assert MEMORY_NAME not in child.stdout


def refusal(fd: int) -> str:
    with pytest.raises(RingError) as error:
        RingReader(fd)
    return str(error.value).replace(f"file descriptor {fd}", "it")


def test_what_is_no_ring_is_refused_in_one_line(tmp_path: Path) -> None:
    assert refusal(-1) == refusal(1_000_000) == "cannot attach to a ring at it: Bad file descriptor"
    path = tmp_path / "file"
    path.touch()
    with path.open("r+b") as file:
        assert refusal(file.fileno()) == "it is not a ring"
    path.write_bytes(bytes(1 << 16))
    with path.open("r+b") as file:
        assert refusal(file.fileno()) == "it is not a ring of this release"
    with path.open("rb") as file:
        assert refusal(file.fileno()) == "cannot attach to a ring at it: Permission denied"


def test_a_ring_of_another_release_or_size_is_refused(writer: RingWriter) -> None:
    before = open_rings()
    for word in (ring._MAGIC, ring._FORMAT, ring._CAPACITY):
        kept, writer._words[word] = writer._words[word], 99
        assert refusal(writer.fd) == "it is not a ring of this release"
        writer._words[word] = kept
    size = os.fstat(writer.fd).st_size
    os.ftruncate(writer.fd, size + PAGE)
    assert refusal(writer.fd) == "it is not a ring of this release"
    os.ftruncate(writer.fd, size)
    assert open_rings() == before
    RingReader(writer.fd).close()


@contextlib.contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


# One limit for each of the three calls: memfd_create, posix_fallocate, mmap. A capacity beyond all memory is no way to
# test this: anonymous memory has no limit of its own, and the kernel would kill processes to find room.
@pytest.mark.parametrize(
    ("what", "soft", "reason"),
    [
        (resource.RLIMIT_NOFILE, 0, "Too many open files"),
        (resource.RLIMIT_FSIZE, 1 << 20, "File too large"),
        (resource.RLIMIT_AS, 16 << 20, "Cannot allocate memory"),
    ],
)
def test_no_memory_is_an_error_in_one_line_not_a_signal(what: int, soft: int, reason: str) -> None:
    before = open_rings()
    if what == resource.RLIMIT_AS:
        soft += psutil.Process().memory_info().vms
    with limited(what, soft), pytest.raises(RingError) as error:
        RingWriter(64 << 20)
    assert str(error.value) == f"cannot reserve {(64 << 10) + 36} KiB of memory for the ring: {reason}"
    assert open_rings() == before


def run(script: str, fd: int, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(script), str(fd), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=(fd,))


READER = """
    import sys, time
    from zlib import crc32
    from stream_monitor.ring import RingReader
    reader = RingReader(int(sys.argv[1]))
    read = lost = tokens = 0
    if reader.state:
        read, lost, tokens = map(int, reader.state.split())
    print("attached", flush=True)
    while True:
        record = reader.read()
        if record is None:
            if reader.closed_by_writer:
                break
            time.sleep(0.001)
            continue
        number = int.from_bytes(record.payload[:8], "little")
        assert number == record.mark.sequence
        assert crc32(record.payload[12:]) == int.from_bytes(record.payload[8:12], "little")
        read, lost = read + 1, lost + record.lost_records
        tokens += record.token_rows + record.lost_token_rows
        reader.commit(record.mark, b"%d %d %d" % (read, lost, tokens))
        if read % 50 == 0:
            time.sleep(float(sys.argv[2]))
    print(read, lost, tokens)
"""


def payload(number: int, size: int) -> bytes:
    body = bytes([number % 251]) * size
    return number.to_bytes(8, "little") + crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(("pause", "kill"), [("0.002", False), ("0.0005", True)])
def test_a_fast_writer_and_a_slow_reader_in_another_process(pause: str, kill: bool) -> None:
    writer = RingWriter(1 << 16)
    reader = run(READER, writer.fd, pause)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "attached\n"
    for number in range(1, 40_001):
        assert writer.write(payload(number, number * 7919 % 4000), 3 * number)
        if kill and number in (10_000, 25_000):
            reader.send_signal(signal.SIGKILL)
            reader.communicate()
            reader = run(READER, writer.fd, pause)
        if number % 64 == 0:
            time.sleep(0.0005)
    if kill:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "attached\n"
    writer.close()
    output, errors = reader.communicate(timeout=20)
    assert errors == ""
    read, lost, tokens = map(int, output.split())
    assert read + lost == 40_000
    assert tokens == 3 * 40_000
    assert read > 1000
    assert lost > 1000
