"""A step whose message would be too large becomes several."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from stream_monitor.records import Rows, StepRecord, encode

MESSAGE_BYTES = 2 << 20
"""Half of the largest message that a monitor takes by default: framing, the ledger and the engine come on top."""
MESSAGE_ROWS = 4096
"""More a receiver does not take (`summary.proto`, Rows.count)."""
_ENTRY_BYTES = 32
"""Of a row or a lifecycle entry beside its id and its arrays."""
_COLUMNS = [name for name in Rows.__struct_fields__ if name != "request_ids"]


def split(record: StepRecord) -> list[StepRecord]:
    """The record alone if its message is small enough, else records that together say the same, all with its ledger.

    What there is of one request stays together where it fits into one message; else its rows follow each other in
    several, after its start and before its tokens and its end. Requests with rows come first, and of the records with
    rows all but the last say that there is `more`.
    """
    labels = [] if record.rows is None else record.rows.request_ids
    if _size(record) <= MESSAGE_BYTES and len(labels) <= MESSAGE_ROWS:
        return [record]
    parts = [_part(record, pieces) for pieces in _filled(_pieces(record))]
    with_rows = [part for part in parts if part.rows is not None]
    for part in with_rows[:-1]:
        part.more = True
    return parts


def _size(record: StepRecord) -> int:
    """Bytes of the message, roughly, and without a look at each request: every step comes by here."""
    labels = [] if record.rows is None else record.rows.request_ids
    return _column_bytes(record.rows) + len(encode((labels, record.started, record.tokens, record.finished)))


def _column_bytes(rows: Rows | None) -> int:
    return 0 if rows is None else sum(len(getattr(rows, name)) for name in _COLUMNS)


class _Piece(NamedTuple):
    """What goes into one message of a request.

    Attributes:
        rows: by their numbers in the record.
        size: bytes in the message, roughly.
        first, last: of the request's.
    """

    request_id: str
    rows: list[int]
    size: int
    first: bool = True
    last: bool = True


def _pieces(record: StepRecord) -> Iterator[_Piece]:
    """Those of all requests; requests with rows first, in their order."""
    labels = [] if record.rows is None else record.rows.request_ids
    rows_of: defaultdict[str, list[int]] = defaultdict(list)
    for row, request_id in enumerate(labels):
        rows_of[request_id].append(row)
    columns = _column_bytes(record.rows) // max(1, len(labels))
    told = _told(record)
    for request_id, rows in rows_of.items():
        of_row = columns + _ENTRY_BYTES + len(request_id)
        # However much there is to tell beside them.
        room = max(MESSAGE_BYTES - told[request_id], MESSAGE_BYTES // 2)
        together = max(1, min(MESSAGE_ROWS, room // of_row))
        for first in range(0, len(rows), together):
            some = rows[first : first + together]
            size = told[request_id] + of_row * len(some)
            yield _Piece(request_id, some, size, first == 0, first + together >= len(rows))
    for request_id, size in told.items():
        if request_id not in rows_of:
            yield _Piece(request_id, [], size)


def _told(record: StepRecord) -> Counter[str]:
    """Bytes of what the message says of each request beside its rows, roughly."""
    sizes: Counter[str] = Counter()
    for run in record.tokens:
        sizes[run.request_id] += _ENTRY_BYTES + len(run.request_id) + len(run.flags) + len(run.token_ids)
    for start in record.started:
        own = len(start.role_starts) + len(start.roles) + len(start.prompt_flags) + len(start.prompt_token_ids)
        sizes[start.request_id] += 2 * _ENTRY_BYTES + len(start.request_id) + own
    for end in record.finished:
        sizes[end.request_id] += _ENTRY_BYTES + len(end.request_id)
    return sizes


def _filled(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """The pieces of each message: as many as fit, in their order."""
    message: list[_Piece] = []
    size = count = 0
    for piece in pieces:
        if message and (size + piece.size > MESSAGE_BYTES or count + len(piece.rows) > MESSAGE_ROWS):
            yield message
            message, size, count = [], 0, 0
        message.append(piece)
        size, count = size + piece.size, count + len(piece.rows)
    if message:
        yield message


def _part(record: StepRecord, pieces: list[_Piece]) -> StepRecord:
    keep = sorted(row for piece in pieces for row in piece.rows)
    number = {row: index for index, row in enumerate(keep)}
    begin = {piece.request_id for piece in pieces if piece.first}
    end = {piece.request_id for piece in pieces if piece.last}
    return replace(
        record,
        step=record.step if keep else 0,
        rows=_some(record.rows, keep) if record.rows is not None and keep else None,
        started=[start for start in record.started if start.request_id in begin],
        tokens=[run for run in record.tokens if run.request_id in end],
        finished=[entry for entry in record.finished if entry.request_id in end],
        audits=[replace(audit, row=number[audit.row]) for audit in record.audits if audit.row in number],
    )


def _some(rows: Rows, keep: list[int]) -> Rows:
    """Rows by their numbers. Every column has as many bytes of each row, or none."""

    def of_these(column: bytes) -> bytes:
        return np.frombuffer(column, np.uint8).reshape(len(rows.request_ids), -1)[keep].tobytes()

    return Rows(
        request_ids=[rows.request_ids[row] for row in keep],
        **{name: of_these(getattr(rows, name)) for name in _COLUMNS},
    )
