"""The backlog against a monitor that is a dictionary: any order of sending, answers, broken streams and crashes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_monitor.publisher import backlog as module
from stream_monitor.publisher.backlog import Backlog, Entry
from stream_monitor.records import Ledger, RowLedger, StepRecord
from stream_monitor.ring import RingReader
from tests.publisher.fakes import INFO, Worker

PER_STEP = 3 * INFO.heads_per_row


class Model:
    """One worker, a publisher's backlog that may crash, and what the monitor took in."""

    def __init__(self) -> None:
        self.worker = Worker(capacity=1 << 20)
        self.reader = RingReader(self.worker.ring.fd)
        self.backlog = Backlog(self.reader)
        self.sent: dict[int, StepRecord] = {}
        self.taken: dict[int, Entry] = {}
        self.newest: tuple[int, Ledger] = (0, Ledger())
        self.stream: list[Entry] = []

    def write(self) -> None:
        self.worker.step()

    def read(self) -> None:
        self.backlog.take()

    def idle(self) -> None:
        self.backlog.take()
        self.backlog.correct()

    def send(self) -> None:
        ready = self.backlog.next()
        if ready is None:
            return
        entry, ledger = ready
        assert not self.stream or entry.sequence > self.stream[-1].sequence
        for rows in (ledger.token_rows, ledger.chunk_rows):
            assert rows.expected == total(rows)
            assert rows.captured >= 0
        # A number never stands for two different records.
        known = self.sent.setdefault(entry.sequence, entry.record)
        assert (known.rows is None, known.step) == (entry.record.rows is None, entry.record.step)
        self.stream.append(entry)
        self.newest = max(self.newest, (entry.sequence, ledger), key=lambda pair: pair[0])

    def take_in(self) -> None:
        """The monitor takes in the oldest summary and its answer gets through."""
        if self.stream:
            entry = self.stream.pop(0)
            assert self.backlog.unanswered is entry
            self.taken.setdefault(entry.sequence, entry)
            self.backlog.settle()

    def refuse(self) -> None:
        if self.stream and self.stream[0].sequence not in self.taken:
            self.stream.pop(0)
            self.backlog.settle(refused="quota")

    def lose_answers(self) -> None:
        """The monitor takes in everything sent, but the stream breaks before it can say so."""
        self.taken |= {entry.sequence: entry for entry in self.stream if entry.sequence not in self.taken}
        self.break_stream()

    def break_stream(self) -> None:
        self.stream.clear()
        self.backlog.rewind()

    def crash(self) -> None:
        self.stream.clear()
        self.reader.close()
        self.reader = RingReader(self.worker.ring.fd)
        self.backlog = Backlog(self.reader)

    def shrink(self) -> None:
        """Room for two records: the next ones push the oldest out."""
        module.WAITING_BYTES = 4_000

    def grow(self) -> None:
        module.WAITING_BYTES = 8 << 20

    def finish(self) -> None:
        """Everything is answered well from here on; then the monitor's books must be right."""
        self.break_stream()
        for _ in range(2):
            while self.backlog.take() or not self.backlog.empty:
                self.send()
                self.take_in()
            self.backlog.correct()
        ledger = self.newest[1]
        steps = sum(entry.record.rows is not None for entry in self.taken.values())
        assert ledger.token_rows.expected == self.worker.tokens.expected
        assert ledger.token_rows.captured == steps * PER_STEP
        assert 3 * ledger.chunk_rows.captured == steps * PER_STEP

    def close(self) -> None:
        self.reader.close()
        self.worker.ring.close()


def total(rows: RowLedger) -> int:
    lost = sum(sum(part.values()) for part in (rows.dropped, rows.refused, rows.discarded))
    return rows.captured + rows.sampled_out + rows.raced + lost


ACTIONS = [
    "write",
    "read",
    "send",
    "take_in",
    "refuse",
    "idle",
    "lose_answers",
    "break_stream",
    "crash",
    "shrink",
    "grow",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), max_size=120))
def test_the_books_are_right_whatever_happens(actions: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WAITING_BYTES", module.WAITING_BYTES)
        patch.setattr(module, "RING_SHARE", 0.0)
        patch.setattr(module, "WINDOW_ENTRIES", 3)
        model = Model()
        try:
            for action in actions:
                getattr(model, action)()
            model.finish()
        finally:
            model.close()


def test_a_successor_does_not_reuse_the_number_of_a_correction() -> None:
    model = Model()
    for action in ("write", "read", "send", "refuse", "idle", "send", "lose_answers", "crash", "write"):
        getattr(model, action)()
    model.finish()
    assert sorted(model.sent) == [1, 2, 3]
    assert model.sent[2].rows is None
    assert model.taken[3].record.step == 2
    model.close()


def test_a_successor_does_not_reuse_the_number_of_a_carrier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING_BYTES", 4_000)
    monkeypatch.setattr(module, "RING_SHARE", 0.0)
    model = Model()
    for action in (*["write"] * 9, "read", "send", "lose_answers", "crash", "grow"):
        getattr(model, action)()
    model.finish()
    assert model.newest[1].token_rows.dropped["monitor_unreachable"] > 0
    model.close()


def test_what_is_sent_again_does_not_count_the_losses_of_what_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING_BYTES", 4_000)
    monkeypatch.setattr(module, "RING_SHARE", 0.0)
    model = Model()
    for action in ("write", "read", "send", *["write"] * 9, "read", "send", "send"):
        getattr(model, action)()
    model.break_stream()
    ready = model.backlog.next()
    assert ready is not None
    assert (ready[0].sequence, ready[1].token_rows.captured, ready[1].token_rows.dropped) == (1, PER_STEP, {})
    model.close()


def test_lifecycle_entries_are_bounded_and_their_losses_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING_BYTES", 4_000)
    monkeypatch.setattr(module, "RING_SHARE", 0.0)
    monkeypatch.setattr(module, "ONE_CARRIER_BYTES", 3_000)
    monkeypatch.setattr(module, "CARRIER_BYTES", 6_000)
    model = Model()
    for _ in range(100):
        model.worker.step(padding=400)
        model.read()
    assert len(model.backlog._carriers) <= 3
    model.finish()
    assert model.newest[1].token_rows.dropped["monitor_unreachable"] > 90 * PER_STEP
    model.close()


def test_a_full_backlog_leaves_a_burst_in_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING_BYTES", 4_000)
    model = Model()
    for _ in range(100):
        model.write()
    model.read()
    assert len(model.backlog._waiting) <= 4
    assert model.reader.unread > 0.03 * model.reader.capacity
    model.finish()
    assert model.newest[1].token_rows.dropped == {}
    for _ in range(1000):
        model.write()
        model.read()
    assert 0.4 < model.reader.unread / model.reader.capacity < 0.51
    model.finish()
    assert model.newest[1].token_rows.dropped.keys() == {"monitor_unreachable"}
    model.close()
