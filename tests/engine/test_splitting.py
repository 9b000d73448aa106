"""A step whose message would be too large, taken apart: nothing is lost, nothing doubled, nothing said too early."""

from collections import Counter
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_monitor.engine import splitting
from stream_monitor.records import (
    Audit,
    Ledger,
    Phase,
    RequestFinished,
    RequestStarted,
    Rows,
    StepRecord,
    TokenRun,
    encode,
)

LIMIT, MOST_ROWS, ROW = 4000, 7, 200
"""Of a part, lowered; and bytes of a row in the only column that is long."""
COLUMNS = [name for name in Rows.__struct_fields__ if name != "request_ids"]

requests = st.lists(
    st.tuples(st.integers(0, 30), st.booleans(), st.integers(0, 6000), st.booleans()), min_size=1, max_size=40
)
"""Of each request: rows, whether it starts, bytes of its prompt's flags, whether it ends."""


def names_of(drawn: list[tuple[int, bool, int, bool]]) -> list[str]:
    return [f"r{number}" for number in range(len(drawn))]


def record(drawn: list[tuple[int, bool, int, bool]]) -> StepRecord:
    names = names_of(drawn)
    of_rows = [(name, place) for name, (count, *_) in zip(names, drawn, strict=True) for place in range(count)]
    # The rows of a request need not follow each other.
    of_rows.sort(key=lambda row: row[1])
    count = len(of_rows)
    draw = np.random.default_rng(0)
    empty = dict.fromkeys(COLUMNS, b"")
    own = {
        "positions": np.array([place for _, place in of_rows], "<u4").tobytes(),
        "attempts": draw.bytes(4 * count),
        "phases": bytes([Phase.DECODE] * count),
        "narrow_block_ids": draw.bytes(ROW * count),
    }
    return StepRecord(
        step=5,
        wall_time_ns=7,
        ledger=Ledger(estimates=3),
        rows=Rows(request_ids=[name for name, _ in of_rows], **(empty | own)) if count else None,
        started=[
            RequestStarted(name, size, b"", b"", draw.bytes(size))
            for name, (_, starts, size, _) in zip(names, drawn, strict=True)
            if starts
        ],
        tokens=[TokenRun(name, 9, b"\2") for name, (rows, *_) in zip(names, drawn, strict=True) if rows],
        finished=[RequestFinished(name, 9) for name, (*_, ends) in zip(names, drawn, strict=True) if ends],
        audits=[Audit(row, row, 0, 0.5, 0.0) for row in range(0, count, 3)],
    )


def columns(records: list[StepRecord]) -> Counter[tuple[object, ...]]:
    """Every row with its id and its bytes of each column."""
    found: Counter[tuple[object, ...]] = Counter()
    for each in records:
        if each.rows is not None:
            count = len(each.rows.request_ids)
            cut = [np.frombuffer(getattr(each.rows, name), np.uint8).reshape(count, -1) for name in COLUMNS]
            found.update(
                (request_id, *(column[row].tobytes() for column in cut))
                for row, request_id in enumerate(each.rows.request_ids)
            )
    return found


def audited(records: list[StepRecord]) -> Counter[tuple[object, ...]]:
    """The layer of every audit, which tells them apart here, with the row it is of."""
    return Counter(
        (audit.layer, each.rows.request_ids[audit.row], each.rows.positions[4 * audit.row :][:4])
        for each in records
        for audit in each.audits
        if each.rows is not None
    )


def named(each: StepRecord) -> set[str]:
    entries = [*each.started, *each.tokens, *each.finished]
    return {entry.request_id for entry in entries} | set(each.rows.request_ids if each.rows else ())


@settings(deadline=None)
@given(requests)
def test_the_parts_say_what_the_step_said(drawn: list[tuple[int, bool, int, bool]]) -> None:
    whole = record(drawn)
    before = encode(whole)
    with mock.patch.multiple(splitting, MESSAGE_BYTES=LIMIT, MESSAGE_ROWS=MOST_ROWS):
        parts = splitting.split(whole)
    assert encode(whole) == before
    assert columns(parts) == columns([whole])
    assert audited(parts) == audited([whole])
    for entries in ("started", "tokens", "finished"):
        together = [entry for part in parts for entry in getattr(part, entries)]
        assert sorted(map(encode, together)) == sorted(map(encode, getattr(whole, entries)))
    for name, (rows, _, told, _) in zip(names_of(drawn), drawn, strict=True):
        where = [place for place, part in enumerate(parts) if name in named(part)]
        if rows <= MOST_ROWS and rows * (ROW + 100) + told + 200 <= LIMIT:
            assert len(where) <= 1, "a request is cut that has room in a message"
        for place, part in enumerate(parts):
            if any(start.request_id == name for start in part.started):
                assert place == where[0], "told of after its rows"
            if any(entry.request_id == name for entry in (*part.tokens, *part.finished)):
                assert place == where[-1], "sampled or ended before all its rows"
        positions = [
            position
            for part in parts
            if part.rows
            for position, of in zip(np.frombuffer(part.rows.positions, "<u4"), part.rows.request_ids, strict=True)
            if of == name
        ]
        assert positions == list(range(rows)), "out of order"
    for part in parts:
        rows = len(part.rows.request_ids) if part.rows else 0
        assert rows <= MOST_ROWS
        largest = max((len(start.prompt_flags) for start in part.started), default=0)
        limit = LIMIT if len(named(part)) > 1 else max(LIMIT, largest + LIMIT // 2)
        assert len(encode(part)) <= limit + len(encode(Ledger())) + 500
        assert (part.wall_time_ns, part.ledger.estimates) == (7, 3)
        assert part.step == (5 if part.rows else 0) or parts == [whole]
    with_rows = [part for part in parts if part.rows]
    assert with_rows == parts[: len(with_rows)], "no message without rows comes between"
    assert [part.more for part in with_rows] == [True] * (len(with_rows) - 1) + [False] * bool(with_rows)


def test_a_small_step_is_left_alone() -> None:
    whole = record([(1, True, 100, False)] * 20)
    assert splitting.split(whole) == [whole]
    assert splitting.split(whole)[0] is whole
