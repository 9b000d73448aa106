"""What is kept of records whose rows had to be dropped: their lifecycle entries, merged into few row-less records."""

from stream_monitor.records import RequestStarted, StepRecord, TokenRun

ENTRY_BYTES = 100
"""Added to the bytes of a lifecycle entry for its fields and framing, in every bound."""


def without_rows(record: StepRecord) -> StepRecord:
    """`record` with its lifecycle entries and ledger only."""
    return StepRecord(
        step=0,
        wall_time_ns=record.wall_time_ns,
        ledger=record.ledger,
        started=list(record.started),
        tokens=list(record.tokens),
        finished=list(record.finished),
    )


def size_of(record: StepRecord) -> int:
    """Bytes of a record's lifecycle entries, roughly."""
    started = sum(
        ENTRY_BYTES + len(s.role_starts) + len(s.roles) + len(s.prompt_flags) + len(s.prompt_token_ids)
        for s in record.started
    )
    tokens = sum(ENTRY_BYTES + len(t.flags) + len(t.token_ids) for t in record.tokens)
    return started + tokens + ENTRY_BYTES * len(record.finished)


def begins_anew(earlier: StepRecord, started: list[RequestStarted]) -> bool:
    """A request of `earlier` starts again, so the two must not become one message, in which starts come first."""
    if not started:
        return False
    known = {entry.request_id for entries in (earlier.started, earlier.tokens, earlier.finished) for entry in entries}
    return any(entry.request_id in known for entry in started)


def merge(earlier: StepRecord, later: StepRecord) -> int:
    """Append the row-less `later` to `earlier`; return how many bytes `earlier` grew by.

    Consecutive tokens of a request become one run: a run for each token would fill the bound a hundred times sooner.
    """
    runs = {run.request_id: place for place, run in enumerate(earlier.tokens)}
    grown = size_of(later)
    for run in later.tokens:
        place = runs.get(run.request_id)
        if place is not None and _continues(earlier.tokens[place], run):
            before = earlier.tokens[place]
            earlier.tokens[place] = TokenRun(
                before.request_id, before.first_position, before.flags + run.flags, before.token_ids + run.token_ids
            )
            grown -= ENTRY_BYTES
        else:
            runs[run.request_id] = len(earlier.tokens)
            earlier.tokens.append(run)
    earlier.started.extend(later.started)
    earlier.finished.extend(later.finished)
    earlier.wall_time_ns, earlier.ledger = later.wall_time_ns, later.ledger
    return grown


def _continues(before: TokenRun, run: TokenRun) -> bool:
    return before.first_position + len(before.flags) == run.first_position and bool(before.token_ids) == bool(
        run.token_ids
    )
