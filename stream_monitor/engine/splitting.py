"""A step whose message would be too large becomes several, each with all that there is of its requests."""

from collections import Counter

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

    What there is of one request stays together, however large it is. Requests with rows come first, and of the records
    with rows all but the last say that there is `more`.
    """
    labels = [] if record.rows is None else record.rows.request_ids
    if _size(record) <= MESSAGE_BYTES and len(labels) <= MESSAGE_ROWS:
        return [record]
    place_of = _places(_sizes(record), Counter(labels))
    parts = [_part(record, place_of, place) for place in range(max(place_of.values()) + 1)]
    with_rows = [part for part in parts if part.rows is not None]
    for part in with_rows[:-1]:
        part.more = True
    return parts


def _size(record: StepRecord) -> int:
    """Bytes of the message, roughly, and without a look at each request: every step comes by here."""
    rows = record.rows
    columns = 0 if rows is None else sum(len(getattr(rows, name)) for name in _COLUMNS)
    labels = [] if rows is None else rows.request_ids
    return columns + len(encode((labels, record.started, record.tokens, record.finished)))


def _sizes(record: StepRecord) -> Counter[str]:
    """Bytes of each request's part of the message, roughly; requests with rows first, in their order."""
    sizes: Counter[str] = Counter()
    if record.rows is not None:
        labels = record.rows.request_ids
        of_row = sum(len(getattr(record.rows, name)) for name in _COLUMNS) // len(labels) + _ENTRY_BYTES
        for request_id in labels:
            sizes[request_id] += of_row + len(request_id)
    for run in record.tokens:
        sizes[run.request_id] += _ENTRY_BYTES + len(run.request_id) + len(run.flags) + len(run.token_ids)
    for start in record.started:
        own = len(start.role_starts) + len(start.roles) + len(start.prompt_flags) + len(start.prompt_token_ids)
        sizes[start.request_id] += 2 * _ENTRY_BYTES + len(start.request_id) + own
    for end in record.finished:
        sizes[end.request_id] += _ENTRY_BYTES + len(end.request_id)
    return sizes


def _places(sizes: Counter[str], rows: Counter[str]) -> dict[str, int]:
    """In which of the parts each request is: the first that is not full when its turn comes."""
    places: dict[str, int] = {}
    place = size = count = 0
    for request_id, own in sizes.items():
        if places and (size + own > MESSAGE_BYTES or count + rows[request_id] > MESSAGE_ROWS):
            place, size, count = place + 1, 0, 0
        places[request_id] = place
        size, count = size + own, count + rows[request_id]
    return places


def _part(record: StepRecord, place_of: dict[str, int], place: int) -> StepRecord:
    labels = [] if record.rows is None else record.rows.request_ids
    keep = [row for row, request_id in enumerate(labels) if place_of[request_id] == place]
    number = {row: index for index, row in enumerate(keep)}
    return replace(
        record,
        step=record.step if keep else 0,
        rows=_some(record.rows, keep) if record.rows is not None and keep else None,
        started=[start for start in record.started if place_of[start.request_id] == place],
        tokens=[run for run in record.tokens if place_of[run.request_id] == place],
        finished=[end for end in record.finished if place_of[end.request_id] == place],
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
