"""How traces lie in the store."""

import zlib

import numpy as np
import pytest

from stream_monitor.monitor.database import packed
from stream_monitor.v1alpha1 import monitor_pb2


@pytest.mark.parametrize("entries", [0, 1, 40_000])
def test_a_packed_trace_is_read_as_any_in_zlibs_format(entries: int) -> None:
    draw = np.random.default_rng(entries)
    trace = monitor_pb2.GetTraceResponse(
        head_row=np.arange(entries, dtype="<u4").tobytes(), head_share=draw.random(entries, np.float32).tobytes()
    )
    trace.sentences.add(index=3, text="So it is seven.")
    raw = trace.SerializeToString(deterministic=True)
    assert zlib.decompress(packed(raw)) == raw
    # All but the shares shrinks.
    assert len(packed(raw)) < 4 * entries + 0.6 * (len(raw) - 4 * entries) + 64
