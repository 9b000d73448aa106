"""A BlockSummary as the packed bytes of the wire (`summary.proto`, Rows)."""

import numpy as np

from stream_kernels.search import BlockSummary
from stream_monitor.engine.requests import RowLabel
from stream_monitor.records import Rows

_NARROW = 0xFFFF
"""Block ids below this are sent in 16 bits; as an id it says that there is no block."""


def pack_rows(summary: BlockSummary, labels: list[RowLabel], keep: list[int]) -> Rows:
    """Pack rows `keep` of a summary [L, R, H, ...]; masses become shares of the row's total, log and float16.

    float16 keeps a log share of -10 to 0.4% of its (tiny) mass and one near 0 to 0.05%, at half the bytes.
    """
    total = summary.total_lse()

    def by_row(array: np.ndarray, dtype: str) -> bytes:
        return np.ascontiguousarray(array[:, keep].swapaxes(0, 1), dtype).tobytes()

    sinks = summary.learned_sink_lse
    narrow = summary.block_ids[:, keep].max(initial=0) < _NARROW
    # Where there is no block, the id is -1: all bits set, in either width.
    ids = by_row(summary.block_ids, "<u2" if narrow else "<u4")
    kept = [labels[row] for row in keep]
    return Rows(
        request_ids=[label.request_id for label in kept],
        positions=np.asarray([label.position for label in kept], "<u4").tobytes(),
        attempts=np.asarray([label.attempt for label in kept], "<u4").tobytes(),
        phases=np.asarray([label.phase for label in kept], np.uint8).tobytes(),
        block_ids=b"" if narrow else ids,
        narrow_block_ids=ids if narrow else b"",
        block_log_share=by_row(summary.block_lse - total[..., None], "<f2"),
        block_strongest=by_row(summary.strongest, "u1"),
        forced_log_share=by_row(summary.forced_lse - total[..., None], "<f2"),
        forced_strongest=by_row(summary.forced_strongest, "u1"),
        unobserved_log_share=by_row(summary.unobserved_lse - total, "<f2"),
        total_lse=by_row(total, "<f4"),
        keys_read=by_row(summary.keys_read, "<f4"),
        learned_sink_log_share=by_row(sinks - total, "<f2") if np.isfinite(sinks).any() else b"",
    )
