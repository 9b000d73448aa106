"""Speculative decoding: a step's rows are those of tokens and of guesses, and which is which shows after sampling.

The row of a rejected guess was never a token's: it is neither searched nor counted. It is counted before the step like
every other, so that nothing depends on what becomes of the step, and taken back once the sampled tokens are known.
"""

from dataclasses import dataclass, field

from stream_monitor.engine.ledger import Outcome, count
from stream_monitor.engine.requests import RowLabel
from stream_monitor.records import Ledger

Fate = tuple[Outcome, str]
"""Outcome and reason under which a row was counted beside `expected`."""


@dataclass(slots=True)
class Drafts:
    """Rows of the requests of one step that verify draft tokens.

    Attributes:
        rows: of each request in the order of their positions: one certain row, then one for each draft token.
        fates: of those that were counted as more than `expected`.
    """

    rows: dict[str, list[RowLabel]] = field(default_factory=dict)
    fates: dict[RowLabel, Fate] = field(default_factory=dict)

    def rejected(self, tokens: dict[str, list[int]]) -> list[RowLabel]:
        """Rows from which no token came: a request's n sampled tokens are those of its first n rows."""
        return [label for request_id, rows in self.rows.items() for label in rows[len(tokens.get(request_id, ())) :]]

    def take_back(self, ledger: Ledger, rejected: list[RowLabel], heads_per_row: int) -> None:
        """Undo what was counted of rejected rows."""
        for label in rejected:
            count(ledger, [label], "expected", "", -heads_per_row)
            if label in self.fates:
                count(ledger, [label], *self.fates[label], -heads_per_row)
