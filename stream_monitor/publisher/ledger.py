"""What the publisher lost, and how that changes the worker's ledger.

The worker's ledger ends at the ring: its `captured` counts what was written there. The summary of a record says instead

    captured = written up to and including this record - rows of those records known to be lost,

and adds the lost rows to `dropped` and `refused`, so that the ledger's equation keeps holding. A loss discovered after
the summary was sent is in the next one.
"""

import re
from collections import Counter
from typing import Literal

import msgspec

from stream_monitor.records import Ledger, RowLedger
from stream_monitor.ring import Mark

CLASSES: tuple[Literal["token_rows"], Literal["chunk_rows"]] = ("token_rows", "chunk_rows")
_REASON = re.compile(r"[a-z][a-z0-9_]{0,47}")
_MOST_REASONS = 16
"""The monitor chooses the reasons of its refusals; a faulty one must not fill the ring's state block with them."""

Losses = Counter[str]
"""Rows lost, by "<class>/<outcome>/<reason>" with outcome "dropped" or "refused", in the ledger's unit."""


class State(msgspec.Struct):
    """What a publisher that takes over after a crash must know: kept in the ring, as of the last settled summary."""

    losses: dict[str, int] = {}
    ledger: Ledger = msgspec.field(default_factory=Ledger)
    extra: int = 0
    """Summaries without a record, so far; a summary's sequence is that of its record plus this."""


encode_state = msgspec.msgpack.Encoder().encode
decode_state = msgspec.msgpack.Decoder(State).decode


def lost(outcome: Literal["dropped", "refused"], reason: str, token_rows: int, chunk_rows: int) -> Losses:
    """Losses of one kind; classes without a loss are left out."""
    rows = zip(CLASSES, (token_rows, chunk_rows), strict=True)
    return Counter({f"{name}/{outcome}/{reason}": count for name, count in rows if count > 0})


def reason_of_refusal(reason: str, losses: Losses) -> str:
    """`reason` as the monitor gave it if it is fit for a metric label and one of few; else "other"."""
    known = {key.split("/")[2] for key in losses}
    if reason in known or (_REASON.fullmatch(reason) and len(known) < _MOST_REASONS):
        return reason
    return "other"


def outgoing(ledger: Ledger, written: Mark, losses: Losses) -> Ledger:
    """The worker's `ledger`, as of the end `written` of the ring, corrected by `losses`.

    Rows written after `ledger` was made, which happens where the last record itself is lost, enter `expected` too.
    """
    rows = {name: _corrected(getattr(ledger, name), getattr(written, name), name, losses) for name in CLASSES}
    return msgspec.structs.replace(ledger, **rows)


def _corrected(rows: RowLedger, written: int, name: str, losses: Losses) -> RowLedger:
    by_outcome: dict[str, Counter[str]] = {"dropped": Counter(rows.dropped), "refused": Counter(rows.refused)}
    total = 0
    for key, count in losses.items():
        owner, outcome, reason = key.split("/")
        if owner == name:
            by_outcome[outcome][reason] += count
            total += count
    return RowLedger(
        expected=rows.expected + written - rows.captured,
        captured=written - total,
        sampled_out=rows.sampled_out,
        governed=rows.governed,
        raced=rows.raced,
        dropped=dict(by_outcome["dropped"]),
        refused=dict(by_outcome["refused"]),
        discarded=rows.discarded,
    )
