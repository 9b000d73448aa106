"""A BlockSummary as the packed bytes of the wire (`summary.proto`, Rows)."""

from collections.abc import Sequence

import numpy as np

from stream_kernels.cpu_kernel.packing import PackedRows
from stream_kernels.cpu_kernel.packing import pack_rows as _pack
from stream_kernels.search import BlockSummary
from stream_monitor.engine.requests import RowLabel
from stream_monitor.records import Rows


def pack_rows(summary: BlockSummary, labels: Sequence[RowLabel], keep: Sequence[int]) -> Rows:
    """Pack rows `keep` of a summary [L, R, H, ...]; masses become shares of the row's total, log and float16.

    float16 keeps a log share of -10 to 0.4% of its (tiny) mass and one near 0 to 0.05%, at half the bytes.

    It is compiled, and does not hold the interpreter lock: beside a forward pass, numpy's many short calls cost the
    engine more than the search.
    """
    layers, _, heads, top_k = summary.block_ids.shape
    lead, forced = (len(keep), layers, heads), summary.forced_lse.shape[-1]
    packed = PackedRows(
        ids=np.empty((*lead, top_k), np.uint32),
        narrow_ids=np.empty((*lead, top_k), np.uint16),
        shares=np.empty((*lead, top_k), np.uint16),
        strongest=np.empty((*lead, top_k), np.uint8),
        forced_shares=np.empty((*lead, forced), np.uint16),
        forced_strongest=np.empty((*lead, forced), np.uint8),
        unobserved=np.empty(lead, np.uint16),
        sink_shares=np.empty(lead, np.uint16),
        total=np.empty(lead, np.float32),
        keys_read=np.empty(lead[:2], np.float32),
    )
    arrays = tuple(np.ascontiguousarray(array) for array in vars(summary).values())
    narrow, sinks = _pack(arrays, np.asarray(keep, np.int64), packed)
    kept = [labels[row] for row in keep]
    return Rows(
        request_ids=[label.request_id for label in kept],
        positions=np.asarray([label.position for label in kept], "<u4").tobytes(),
        attempts=np.asarray([label.attempt for label in kept], "<u4").tobytes(),
        phases=np.asarray([label.phase for label in kept], np.uint8).tobytes(),
        block_ids=b"" if narrow else packed.ids.tobytes(),
        narrow_block_ids=packed.narrow_ids.tobytes() if narrow else b"",
        block_log_share=packed.shares.tobytes(),
        block_strongest=packed.strongest.tobytes(),
        forced_log_share=packed.forced_shares.tobytes(),
        forced_strongest=packed.forced_strongest.tobytes(),
        unobserved_log_share=packed.unobserved.tobytes(),
        total_lse=packed.total.tobytes(),
        keys_read=packed.keys_read.tobytes(),
        learned_sink_log_share=packed.sink_shares.tobytes() if sinks else b"",
    )
