"""Records between the ring and the monitor's acknowledgement: order, bounds, numbering and losses.

Three queues, in ascending sequence:

    attempted   handed to gRPC at least once and not answered; sent again, first, after a reconnection. Never dropped,
                because the monitor may have taken them in; bounded by the window.
    carriers    lifecycle entries of records whose rows were dropped
    waiting     not sent yet; where they fill `WAITING_BYTES` and the ring fills up, too, the oldest become carriers

Whatever is answered is settled: the place to resume from moves on in the ring, together with all counts, so that a
publisher that takes over after a crash sends exactly what was not settled, under the same sequence numbers.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import msgspec

from stream_monitor.publisher import carrier
from stream_monitor.publisher.ledger import (
    Losses,
    State,
    decode_state,
    encode_state,
    lost,
    outgoing,
    reason_of_refusal,
)
from stream_monitor.records import Ledger, QueueState, StepRecord, decode
from stream_monitor.ring import Mark, Record, RingReader

WAITING_BYTES = 8 << 20
RING_SHARE = 0.5
"""So much of the ring may wait, too, before the backlog drops anything."""
CARRIER_BYTES = 4 << 20
ONE_CARRIER_BYTES = 1 << 20
"""A quarter of the largest message that gRPC and the monitor take by default."""
WINDOW_BYTES = 4 << 20
"""Unanswered at a time: a message of a whole model's heads is over a megabyte, and one must wait while one is read."""
WINDOW_ENTRIES = 256
_ENTRY_OVERHEAD = 1024
"""Bytes of Python objects of one record besides its arrays, roughly."""
_FAULT_CHARACTERS = 1000


@dataclass(slots=True)
class Entry:
    """One summary to be."""

    sequence: int
    record: StepRecord
    mark: Mark
    """Place in the ring after the last record this entry covers."""
    size: int
    token_rows: int = 0
    chunk_rows: int = 0
    losses: Losses = field(default_factory=Losses)
    """Rows lost between the entry before and this one."""
    failures: int = 0
    """Times the stream ended with a fault while this entry alone was unanswered."""


class Backlog:
    """Not thread-safe. `reader` is taken over: the backlog reads, and commits what is settled."""

    def __init__(self, reader: RingReader) -> None:
        self._reader = reader
        state = decode_state(reader.state) if reader.state else State()
        self._ledger, self._extra = state.ledger, state.extra
        self._settled, self._settled_losses = reader.mark, Losses(state.losses)
        self._sent_losses = self._settled_losses.copy()
        self._attempted: deque[Entry] = deque()
        self._carriers: deque[Entry] = deque()
        self._waiting: deque[Entry] = deque()
        self._attempted_bytes = self._carrier_bytes = self._waiting_bytes = 0
        self._attempted_before = reader.attempted  # by a publisher that crashed
        self._cursor = 0  # entries of `attempted` sent on the present stream
        self._unreadable = Losses()
        self._last_sent: Ledger | None = None
        self.careful = 0
        """So many entries more are sent one at a time, to find the one that the monitor cannot take."""

    # From the ring

    def take(self, most: int = 256) -> int:
        """Move up to `most` records from the ring to the backlog; return how many.

        A full backlog leaves them in the ring while that has room, and only then drops rows: a burst is no loss.
        """
        for count in range(most):
            while self._waiting_bytes >= WAITING_BYTES:
                if self._reader.unread < RING_SHARE * self._reader.capacity:
                    return count
                self._drop_oldest()
            record = self._reader.read()
            if record is None:
                return count
            self._append(record)
        return most

    def _append(self, record: Record) -> None:
        reason = "torn" if record.torn else "ring_full"
        losses = lost("dropped", reason, record.lost_token_rows, record.lost_chunk_rows)
        try:
            step = decode(record.payload)
        except (msgspec.DecodeError, msgspec.ValidationError):
            self._unreadable += losses + lost("dropped", "torn", record.token_rows, record.chunk_rows)
            return
        losses += self._unreadable
        self._unreadable = Losses()
        size = len(record.payload) + _ENTRY_OVERHEAD
        sequence = record.mark.sequence + self._extra
        entry = Entry(sequence, step, record.mark, size, record.token_rows, record.chunk_rows, losses)
        if record.mark.sequence <= self._attempted_before:
            self._attempted.append(entry)
            self._attempted_bytes += size
        else:
            self._waiting.append(entry)
            self._waiting_bytes += size

    def _drop_oldest(self) -> None:
        """Drop the rows of the oldest entry that was never sent, and keep its lifecycle entries."""
        entry = self._waiting.popleft()
        self._waiting_bytes -= entry.size
        entry.losses += lost("dropped", "monitor_unreachable", entry.token_rows, entry.chunk_rows)
        entry.token_rows = entry.chunk_rows = 0
        entry.record = carrier.without_rows(entry.record)
        entry.size = carrier.size_of(entry.record) + _ENTRY_OVERHEAD
        last = self._carriers[-1] if self._carriers else None
        if (
            last is None
            or last.size + entry.size > ONE_CARRIER_BYTES
            or carrier.begins_anew(last.record, entry.record.started)
        ):
            self._carriers.append(entry)
            self._carrier_bytes += entry.size
        else:
            grown = carrier.merge(last.record, entry.record)
            last.size += grown
            self._carrier_bytes += grown
            last.sequence, last.mark = entry.sequence, entry.mark
            last.losses += entry.losses
        while self._carrier_bytes > CARRIER_BYTES and len(self._carriers) > 1:
            oldest = self._carriers.popleft()
            self._carrier_bytes -= oldest.size
            self._carriers[0].losses += oldest.losses

    # To the monitor

    def next(self) -> tuple[Entry, Ledger] | None:
        """The next entry to send on this stream, with the ledger its summary must show; None if nothing may be sent."""
        if self._cursor < len(self._attempted):
            if self.careful and self._cursor:
                return None
            entry = self._attempted[self._cursor]
        else:
            entry_or_none = self._fresh()
            if entry_or_none is None:
                return None
            entry = entry_or_none
        self._cursor += 1
        self._sent_losses += entry.losses
        self._last_sent = outgoing(entry.record.ledger, entry.mark, self._sent_losses)
        return entry, self._with_own_counts(self._last_sent)

    def _with_own_counts(self, ledger: Ledger) -> Ledger:
        self._reader.sent += 1
        queues = [
            *ledger.queues,
            QueueState("ring", self._reader.unread, self._reader.capacity),
            QueueState("backlog", self._waiting_bytes, WAITING_BYTES),
        ]
        return msgspec.structs.replace(ledger, sent=self._reader.sent, queues=queues)

    def _fresh(self) -> Entry | None:
        full = self._attempted_bytes >= WINDOW_BYTES or len(self._attempted) >= WINDOW_ENTRIES
        if self._attempted and (full or self.careful):
            return None
        if self._carriers:
            if self._attempted:
                return None
            entry = self._carriers.popleft()
            self._carrier_bytes -= entry.size
            self._book(entry)
        elif self._waiting:
            entry = self._waiting.popleft()
            self._waiting_bytes -= entry.size
        else:
            return None
        self._attempted.append(entry)
        self._attempted_bytes += entry.size
        self._reader.attempted = entry.mark.sequence
        return entry

    def _book(self, entry: Entry) -> None:
        """Settle a carrier's losses before it is sent.

        A successor would read its records in the ring again and send one with rows under the carrier's number, which
        the monitor would take for a duplicate. For that all before must be settled, too.
        """
        self._settled_losses += entry.losses
        self._sent_losses += entry.losses
        entry.losses = Losses()
        self._ledger, self._settled = entry.record.ledger, entry.mark
        self._commit()

    @property
    def unanswered(self) -> Entry | None:
        """The oldest entry sent on this stream and not answered."""
        return self._attempted[0] if self._cursor else None

    @property
    def in_flight(self) -> int:
        """Entries sent on this stream and not answered."""
        return self._cursor

    def rewind(self) -> None:
        """The stream ended: what was not answered will be sent again."""
        self._cursor = 0
        self._sent_losses = self._settled_losses.copy()

    def settle(self, refused: str | None = None) -> None:
        """The oldest unanswered entry was taken in or, with a reason, `refused`."""
        entry = self._attempted.popleft()
        self._attempted_bytes -= entry.size
        self._cursor -= 1
        self.careful = max(0, self.careful - 1)
        self._settled_losses += entry.losses
        if refused is not None:
            reason = reason_of_refusal(refused, self._settled_losses)
            own = lost("refused", reason, entry.token_rows, entry.chunk_rows)
            self._settled_losses += own
            self._sent_losses += own
        self._ledger, self._settled = entry.record.ledger, entry.mark
        self._commit()

    def _commit(self) -> None:
        ledger = msgspec.structs.replace(self._ledger, fault=self._ledger.fault[:_FAULT_CHARACTERS])
        self._reader.commit(self._settled, encode_state(State(self._settled_losses, ledger, self._extra)))

    @property
    def empty(self) -> bool:
        """Everything read from the ring is settled."""
        return not (self._attempted or self._carriers or self._waiting)

    def correct(self, at_end: bool = False) -> bool:
        """If all is settled and the monitor's ledger is not right yet, add a summary that only carries the ledger.

        `at_end`: nothing more will be written, so what is missing at the end of the ring is lost. Before that it may
        be a record on its way, and the next record tells.
        """
        if not self.empty:
            return False
        mark = max(self._reader.mark, self._settled, key=lambda place: place.sequence)
        losses = Losses(self._unreadable)
        if at_end:
            mark, missing = self._at_end(mark)
            losses += missing
        if mark.sequence == 0:
            return False
        if self._last_sent == outgoing(self._ledger, mark, self._settled_losses + losses):
            return False
        self._unreadable = Losses()
        # The number is taken before the summary can be sent: a successor that reused it for a record would see that
        # record answered as a duplicate.
        self._extra += 1
        self._commit()
        record = StepRecord(step=0, wall_time_ns=time.time_ns(), ledger=self._ledger)
        self._waiting.append(Entry(mark.sequence + self._extra, record, mark, _ENTRY_OVERHEAD, losses=losses))
        self._waiting_bytes += _ENTRY_OVERHEAD
        return True

    def _at_end(self, mark: Mark) -> tuple[Mark, Losses]:
        written = self._reader.written()
        if written is None or written.sequence == mark.sequence:
            return mark, Losses()
        tokens, chunks = written.token_rows - mark.token_rows, written.chunk_rows - mark.chunk_rows
        return written, lost("dropped", "torn", tokens, chunks)
