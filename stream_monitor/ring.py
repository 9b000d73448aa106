"""The shared-memory ring between a worker and its publisher: variable-length records, one writer, one reader.

The writer never waits and makes no system call: a full ring loses its oldest records, and the reader learns from the
numbers in each record exactly how many records and rows it lost. Layout, all little-endian:

    0      uint64 words: the writer's (`_MAGIC` .. `_CHUNK_ROWS`), and the reader's `_ATTEMPTED`, `_SENT`
    4096   consumer slots 0 and 1, 16 KiB each: where the reader will resume, written alternately
    36864  data, `capacity` bytes; a byte's place is its monotone position modulo `capacity`

Order of a write: `tail` moves past what will be overwritten, then the record, then `head`. The reader copies a record
and looks at `tail` again. Machines that reorder stores are caught by the CRC over the record.

The file is anonymous memory (memfd): it has no name, the reader inherits its descriptor, and the kernel frees it with
the last process that holds it. However worker and publisher die, nothing stays behind; and the size that a container
gives to /dev/shm does not matter.
"""

import mmap
import os
import struct
import time
from typing import NamedTuple
from zlib import crc32

MEMORY_NAME = "stream-monitor-ring"
"""As it shows in /proc/PID/fd and /proc/PID/maps, after `memfd:`."""
_MAGIC_VALUE = 0x676E69526E6F4D53  # b"SMonRing"
_VERSION = 1
_MAGIC, _FORMAT, _CAPACITY, _CLOSED, _HEAD, _TAIL, _SEQUENCE, _TOKEN_ROWS, _CHUNK_ROWS = range(9)
_ATTEMPTED, _SENT = range(9, 11)
_SLOT_BYTES = 16384
_SLOTS = (4096, 4096 + _SLOT_BYTES)
_DATA = 4096 + 2 * _SLOT_BYTES
_ALIGN = 16  # so that length and CRC, which begin a record, never lie across the end of the data
_LEAD = struct.Struct("<II")  # payload length; CRC-32 of everything after this field
_BODY = struct.Struct("<QQQQQ")  # sequence; token and chunk rows written before this record; the same including it
_HEADER_BYTES = _LEAD.size + _BODY.size
_SLOT = struct.Struct(
    "<IIQQQQQ"
)  # CRC of all after it; state length; generation; position; sequence; token, chunk rows
STATE_BYTES = _SLOT_BYTES - _SLOT.size
"""Most bytes of the reader's own state that `RingReader.commit` can keep."""
_TORN_SECONDS = 0.05
"""A record whose CRC is wrong may still be on its way from another core; after this long it is given up."""


class RingError(RuntimeError):
    """The ring cannot be created or attached; the message is one line."""


class Mark(NamedTuple):
    """A place in the stream of records: just after record `sequence` (0: before the first)."""

    position: int
    sequence: int
    token_rows: int
    chunk_rows: int


class Record(NamedTuple):
    """One record and what was lost between the one read before and this one."""

    payload: bytes
    mark: Mark
    token_rows: int
    chunk_rows: int
    lost_records: int
    lost_token_rows: int
    lost_chunk_rows: int
    torn: bool
    """Part of the loss is a record that was damaged, not overwritten."""


def _span(payload_bytes: int) -> int:
    return -(-(_HEADER_BYTES + payload_bytes) // _ALIGN) * _ALIGN


class RingWriter:
    """The worker's end. Not thread-safe: one thread writes.

    `RingWriter(1 << 24)` creates a ring of 16 MiB; `fd` is what the reader needs, inherited under the same number.
    Raises RingError where the memory cannot be had.
    """

    def __init__(self, capacity: int) -> None:
        capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        size = _DATA + capacity
        try:
            self.fd = os.memfd_create(MEMORY_NAME, os.MFD_CLOEXEC)
            try:
                # Reserve the memory now: a sparse file ends the worker with SIGBUS at the first write without room.
                os.posix_fallocate(self.fd, 0, size)
                self._map = mmap.mmap(self.fd, size)
            except OSError:
                os.close(self.fd)
                raise
        except OSError as error:
            raise RingError(f"cannot reserve {size >> 10} KiB of memory for the ring: {error.strerror}") from None
        self._bytes = memoryview(self._map)
        self._words = self._bytes[: _SLOTS[0]].cast("Q")
        self._data = self._bytes[_DATA:]
        self._capacity = capacity
        self._head = self._tail = self._sequence = self._token_rows = self._chunk_rows = 0
        self._words[_MAGIC], self._words[_FORMAT], self._words[_CAPACITY] = _MAGIC_VALUE, _VERSION, capacity

    def write(self, payload: bytes, token_rows: int = 0, chunk_rows: int = 0) -> bool:
        """Append one record, over the oldest ones if need be. False, and nothing written, if it exceeds the ring.

        `token_rows`, `chunk_rows`: rows of each class written so far including this record, cumulative, in the
        ledger's unit (`ledger.token_rows.captured`, `ledger.chunk_rows.captured` of the record). From these the reader
        knows what it lost.
        """
        length = len(payload)
        span = _span(length)
        capacity = self._capacity
        if span > capacity:
            return False
        head = self._head
        oldest = head + span - capacity
        if self._tail < oldest:
            tail = self._tail
            while tail < oldest:
                tail += _span(_LEAD.unpack_from(self._data, tail % capacity)[0])
            self._tail = self._words[_TAIL] = tail
        body = _BODY.pack(self._sequence + 1, self._token_rows, self._chunk_rows, token_rows, chunk_rows)
        lead = _LEAD.pack(length, crc32(payload, crc32(body)))
        start = head % capacity
        if start + span <= capacity:
            self._data[start : start + _HEADER_BYTES] = lead + body
            self._data[start + _HEADER_BYTES : start + _HEADER_BYTES + length] = payload
        else:
            whole = (lead + body + payload).ljust(span, b"\0")
            self._data[start:] = whole[: capacity - start]
            self._data[: span - (capacity - start)] = whole[capacity - start :]
        self._sequence += 1
        self._token_rows, self._chunk_rows = token_rows, chunk_rows
        self._words[_SEQUENCE], self._words[_TOKEN_ROWS], self._words[_CHUNK_ROWS] = (
            self._sequence,
            token_rows,
            chunk_rows,
        )
        self._head = self._words[_HEAD] = head + span
        return True

    def skip(self) -> None:
        """Take the number of a record that is lost before it could be written: the reader finds it missing."""
        self._sequence += 1
        self._words[_SEQUENCE] = self._sequence

    @property
    def sequence(self) -> int:
        """Records written so far, those skipped included."""
        return self._sequence

    def close(self) -> None:
        """Say that nothing more will come, and let go; a reader that is attached can still read the rest."""
        if self._map.closed:
            return
        self._words[_CLOSED] = 1
        _unmap(self._map, self._words, self._data, self._bytes)
        os.close(self.fd)


class RingReader:
    """The publisher's end: continues where the last `commit` on this ring left off, else at the first record.

    Raises RingError if the file open as `fd` is not a ring of this release. `fd` stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        try:
            size = os.fstat(fd).st_size
            if size <= _DATA:
                raise RingError(f"file descriptor {fd} is not a ring")
            self._map = mmap.mmap(fd, size)
        except OSError as error:
            raise RingError(f"cannot attach to a ring at file descriptor {fd}: {error.strerror}") from None
        self._bytes = memoryview(self._map)
        self._words = self._bytes[: _SLOTS[0]].cast("Q")
        self._data = self._bytes[_DATA:]
        self._capacity = len(self._data)
        found = (self._words[_MAGIC], self._words[_FORMAT], self._words[_CAPACITY])
        if found != (_MAGIC_VALUE, _VERSION, self._capacity):
            self.close()
            raise RingError(f"file descriptor {fd} is not a ring of this release")
        self._suspect = (-1, 0.0)  # position of a record with a wrong CRC, and when it was first seen
        self._torn = False
        self._generation, self._mark, self.state = self._committed()

    def read(self) -> Record | None:
        """The next record, or None if there is none yet."""
        while True:
            head, tail = self._words[_HEAD], self._words[_TAIL]
            position = max(self._mark.position, tail)
            if position >= head:
                return None
            lead = self._copy(position, _HEADER_BYTES)
            length, crc = _LEAD.unpack_from(lead)
            span = _span(length)
            whole = position + span <= head
            payload = self._copy(position + _HEADER_BYTES, length) if whole else b""
            if self._words[_TAIL] > position:
                continue  # overwritten while we copied
            if whole and crc32(payload, crc32(lead[_LEAD.size :])) == crc:
                break
            if self._suspect[0] != position:
                self._suspect = (position, time.monotonic())
            if time.monotonic() - self._suspect[1] < _TORN_SECONDS:
                return None
            self._skip(position + span if whole else head)
        sequence, tokens_before, chunks_before, tokens, chunks = _BODY.unpack_from(lead, _LEAD.size)
        before = self._mark
        record = Record(
            payload,
            Mark(position + span, sequence, tokens, chunks),
            tokens - tokens_before,
            chunks - chunks_before,
            sequence - before.sequence - 1,
            tokens_before - before.token_rows,
            chunks_before - before.chunk_rows,
            self._torn,
        )
        self._mark, self._torn = record.mark, False
        return record

    def _skip(self, position: int) -> None:
        """Give up a damaged record. The loss shows when the next one is read, or in `written`."""
        self._mark = self._mark._replace(position=position)
        self._torn = True

    def _copy(self, position: int, length: int) -> bytes:
        start = position % self._capacity
        end = start + length
        if end <= self._capacity:
            return bytes(self._data[start:end])
        return bytes(self._data[start:]) + bytes(self._data[: end - self._capacity])

    @property
    def mark(self) -> Mark:
        """After the last record read."""
        return self._mark

    def written(self) -> Mark | None:
        """After the last record written, read or not; None while the writer is just writing."""
        order = (_HEAD, _SEQUENCE, _TOKEN_ROWS, _CHUNK_ROWS)
        first = Mark(*(self._words[word] for word in order))
        return first if first == Mark(*(self._words[word] for word in order)) else None

    @property
    def capacity(self) -> int:
        """Bytes of records that the ring holds."""
        return self._capacity

    @property
    def unread(self) -> int:
        """Bytes that are written and not read yet."""
        return max(0, self._words[_HEAD] - max(self._mark.position, self._words[_TAIL]))

    def commit(self, mark: Mark, state: bytes) -> None:
        """Keep in the ring where a reader that takes over after a crash resumes, and `state`, at most STATE_BYTES.

        All or nothing, whenever this process is killed. Raises ValueError if `state` is too long.
        """
        if len(state) > STATE_BYTES:
            raise ValueError(f"state of {len(state)} bytes exceeds {STATE_BYTES}")
        self._generation += 1
        body = _SLOT.pack(0, len(state), self._generation, *mark)[4:] + state
        start = _SLOTS[self._generation % 2]
        self._bytes[start : start + 4 + len(body)] = crc32(body).to_bytes(4, "little") + body

    def _committed(self) -> tuple[int, Mark, bytes]:
        best = (0, Mark(0, 0, 0, 0), b"")
        for start in _SLOTS:
            crc, length, generation, *mark = _SLOT.unpack_from(self._bytes, start)
            body = bytes(self._bytes[start + 4 : start + _SLOT.size + min(length, STATE_BYTES)])
            if generation > best[0] and crc32(body) == crc:
                best = (generation, Mark(*mark), body[_SLOT.size - 4 :])
        return best

    @property
    def attempted(self) -> int:
        """Sequence of the last record that any reader of this ring tried to pass on; kept for successors."""
        return int(self._words[_ATTEMPTED])

    @attempted.setter
    def attempted(self, sequence: int) -> None:
        self._words[_ATTEMPTED] = sequence

    @property
    def sent(self) -> int:
        """Summaries that readers of this ring handed to the stream, those sent again included; kept for successors."""
        return int(self._words[_SENT])

    @sent.setter
    def sent(self, count: int) -> None:
        self._words[_SENT] = count

    @property
    def closed_by_writer(self) -> bool:
        """The writer said that nothing more will come."""
        return bool(self._words[_CLOSED])

    def close(self) -> None:
        """Detach. The ring stays."""
        if not self._map.closed:
            _unmap(self._map, self._words, self._data, self._bytes)


def _unmap(memory: mmap.mmap, *views: memoryview) -> None:
    for view in views:
        view.release()
    memory.close()
