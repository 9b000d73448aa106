"""Counting rows so that nothing is silent. The runner thread and the estimator thread keep a ledger each; a record
carries their sum, the runner's as of its step."""

from collections.abc import Sequence
from typing import Literal

from stream_monitor.engine.requests import RowLabel
from stream_monitor.records import Ledger, Phase, RowLedger

Outcome = Literal["expected", "captured", "sampled_out", "governed", "raced", "dropped", "refused", "discarded"]


def count(ledger: Ledger, labels: Sequence[RowLabel], outcome: Outcome, reason: str, heads_per_row: int) -> None:
    """Add rows to one cell; `reason` belongs to dropped, refused and discarded alone."""
    chunks = sum([label.phase is Phase.PREFILL_CHUNK for label in labels])
    for rows, number in (ledger.token_rows, len(labels) - chunks), (ledger.chunk_rows, chunks):
        if number and reason:
            cells: dict[str, int] = getattr(rows, outcome)
            cells[reason] = cells.get(reason, 0) + number * heads_per_row
        elif number:
            setattr(rows, outcome, getattr(rows, outcome) + number * heads_per_row)


def merged(runner: Ledger, estimator: Ledger) -> Ledger:
    """The sum of both; a new object."""
    return Ledger(
        token_rows=_added(runner.token_rows, estimator.token_rows),
        chunk_rows=_added(runner.chunk_rows, estimator.chunk_rows),
        estimates=runner.estimates + estimator.estimates,
        estimate_seconds=runner.estimate_seconds + estimator.estimate_seconds,
        fault=runner.fault or estimator.fault,
        refused_arguments=dict(runner.refused_arguments),
        key_bytes=runner.key_bytes + estimator.key_bytes,
        record_bytes=runner.record_bytes + estimator.record_bytes,
        queues=runner.queues,
        hook_seconds=runner.hook_seconds,
        stride=runner.stride,
        device_waits=runner.device_waits,
    )


def snapshot(ledger: Ledger) -> Ledger:
    """A copy that later counts do not change."""
    return merged(ledger, Ledger())


def _added(a: RowLedger, b: RowLedger) -> RowLedger:
    def cells(x: dict[str, int], y: dict[str, int]) -> dict[str, int]:
        return {key: x.get(key, 0) + y.get(key, 0) for key in x.keys() | y.keys()}

    return RowLedger(
        expected=a.expected + b.expected,
        captured=a.captured + b.captured,
        sampled_out=a.sampled_out + b.sampled_out,
        governed=a.governed + b.governed,
        raced=a.raced + b.raced,
        dropped=cells(a.dropped, b.dropped),
        refused=cells(a.refused, b.refused),
        discarded=cells(a.discarded, b.discarded),
    )
