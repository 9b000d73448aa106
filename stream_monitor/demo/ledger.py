"""Reads the monitor's account of rows: what the engine could have captured, and what became of it."""

import time
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass

from prometheus_client.parser import text_string_to_metric_families

# Counters of the monitor; see monitor/metric_table.py. Fates have one sample per outcome and reason.
EXPECTED = "stream_monitor_rows_expected_total"
FATES = "stream_monitor_rows_total"
# While the engine decodes, the last rows are still on their way; afterwards the account closes within seconds.
SETTLE_SECONDS = 10.0
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class RowAccount:
    """Rows from which a token was sampled, counted per layer and query head. Each expected row has one fate."""

    rows_expected: int
    rows_captured: int
    # Left out on purpose: not one in every `stride` positions.
    rows_sampled_out: int
    # Lost on the way for any reason: queue or ring full, key cache rewritten too early, superseded, past the end.
    rows_dropped: int
    # Not captured by decision: the request or the model cannot be, or may not be.
    rows_refused: int

    @property
    def balanced(self) -> bool:
        """Whether every expected row is accounted for."""
        fates = (self.rows_captured, self.rows_sampled_out, self.rows_dropped, self.rows_refused)
        return self.rows_expected == sum(fates)

    def fault(self) -> str | None:
        """Why this account does not show a working monitor, or None."""
        if not self.rows_expected:
            return "the engine expected no rows: the plug-in is not active"
        if not self.rows_captured:
            return f"none of {self.rows_expected} rows was captured"
        if not self.balanced:
            return f"the account of rows does not add up: {asdict(self)}"
        return None


def read_ledger(http: str) -> RowAccount:
    """The account as the monitor at `http` (host:port) shows it now."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=5) as response:
        return parse_ledger(response.read().decode())


def parse_ledger(metrics: str) -> RowAccount:
    """The account in a page of metrics."""
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            # Ends of prefill chunks have an account of their own, phase "chunk".
            if sample.name in (EXPECTED, FATES) and sample.labels["phase"] == "token":
                counts[sample.labels.get("outcome", "expected")] += int(sample.value)
    return RowAccount(
        rows_expected=counts["expected"],
        rows_captured=counts["captured"],
        rows_sampled_out=counts["sampled_out"],
        rows_dropped=sum(counts[outcome] for outcome in ("dropped", "raced", "discarded")),
        rows_refused=counts["refused"],
    )


def settled_ledger(http: str) -> RowAccount:
    """The account once it is balanced and stands still, or as it is when that takes too long."""
    deadline = time.monotonic() + SETTLE_SECONDS
    previous = None
    while True:
        account = read_ledger(http)
        if (account.balanced and account.rows_expected and account == previous) or time.monotonic() > deadline:
            return account
        previous = account
        time.sleep(POLL_SECONDS)
