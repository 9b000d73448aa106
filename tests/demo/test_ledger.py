"""The demo's account of rows, from a page of metrics."""

from stream_monitor.demo.ledger import parse_ledger

PAGE = """\
# TYPE stream_monitor_rows_expected_total counter
stream_monitor_rows_expected_total{engine="0",phase="token"} 100.0
stream_monitor_rows_expected_total{engine="0",phase="chunk"} 9.0
# TYPE stream_monitor_rows_total counter
stream_monitor_rows_total{engine="0",phase="token",outcome="captured",reason=""} 20.0
stream_monitor_rows_total{engine="0",phase="token",outcome="sampled_out",reason=""} 70.0
stream_monitor_rows_total{engine="0",phase="token",outcome="dropped",reason="ring_full"} 4.0
stream_monitor_rows_total{engine="0",phase="token",outcome="raced",reason="block_reused"} 1.0
stream_monitor_rows_total{engine="0",phase="token",outcome="discarded",reason="past_end"} 2.0
stream_monitor_rows_total{engine="0",phase="token",outcome="refused",reason="client_disabled"} 3.0
stream_monitor_rows_total{engine="0",phase="chunk",outcome="captured",reason=""} 9.0
"""


def test_every_row_has_one_fate() -> None:
    account = parse_ledger(PAGE)
    assert (account.rows_expected, account.rows_captured, account.rows_sampled_out) == (100, 20, 70)
    assert (account.rows_dropped, account.rows_refused) == (7, 3)
    assert account.fault() is None


def test_a_missing_row_is_a_fault() -> None:
    fault = parse_ledger(PAGE.replace("} 100", "} 101")).fault()
    assert fault is not None
    assert "does not add up" in fault


def test_silence_is_a_fault() -> None:
    assert parse_ledger("").fault() == "the engine expected no rows: the plug-in is not active"
    assert parse_ledger(PAGE.replace("} 20.0", "} 0.0")).fault() == "none of 100 rows was captured"
