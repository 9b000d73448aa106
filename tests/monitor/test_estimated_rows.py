"""What the estimator finds on random keys, packed as the engine packs it, is what the monitor takes in."""

import numpy as np
import pytest
import torch

from stream_kernels import reference
from stream_kernels.search import NO_BLOCK, BlockSummary, SearchConfig
from stream_monitor.engine.packing import pack_rows
from stream_monitor.engine.requests import RowLabel
from stream_monitor.monitor.rows import decode
from stream_monitor.records import Phase
from stream_monitor.v1alpha1 import summary_pb2
from tests.monitor.synthetic import engine
from tests.stream_kernels.cases import Case, draw

CONTEXTS = (1, 31, 32, 33, 70, 97, 500, 2300)


@pytest.mark.parametrize(("highest", "width"), [(0xFFFE, 2), (0xFFFF, 4)])
def test_block_ids_take_16_bits_where_all_that_are_sent_fit(highest: int, width: int) -> None:
    summary = BlockSummary.allocate(1, 2, 1, SearchConfig(top_k=4))
    summary.block_ids[0, 0, 0, 0], summary.block_ids[0, 1, 0, 0] = highest, 1 << 30
    summary.forced_lse[...] = 0.0
    label = RowLabel("r", highest * 32, 0, Phase.DECODE, "", True)
    packed = pack_rows(summary, [label, label], [0])
    ids = np.frombuffer(packed.narrow_block_ids or packed.block_ids, f"<u{width}")
    assert ids.tolist() == [highest, *[(1 << 8 * width) - 1] * 3]
    assert not (packed.narrow_block_ids and packed.block_ids)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_are_packed_as_numpy_would(sinks: bool) -> None:
    draw = np.random.default_rng(0)
    summary = BlockSummary.allocate(3, 5, 4, SearchConfig(top_k=4))
    for array in vars(summary).values():
        array[...] = draw.uniform(0, 40, array.shape)
    summary.block_ids[draw.random(summary.block_ids.shape) < 0.3] = NO_BLOCK
    summary.block_lse[summary.block_ids == NO_BLOCK] = -np.inf
    summary.unobserved_lse[:, 1] = -np.inf
    if not sinks:
        summary.learned_sink_lse[...] = -np.inf
    keep = [4, 1, 2]
    packed = pack_rows(summary, [RowLabel(f"r{n}", n, 0, Phase.DECODE, "", True) for n in range(5)], keep)
    total = summary.total_lse()[..., None]
    expected = {
        "narrow_block_ids": (summary.block_ids, "<u2", 0.0),
        "block_log_share": (summary.block_lse - total, "<f2", 2e-3),
        "block_strongest": (summary.strongest, "u1", 0.0),
        "forced_log_share": (summary.forced_lse - total, "<f2", 2e-3),
        "forced_strongest": (summary.forced_strongest, "u1", 0.0),
        "unobserved_log_share": (summary.unobserved_lse - total[..., 0], "<f2", 2e-3),
        "total_lse": (total[..., 0], "<f4", 1e-6),
        "keys_read": (summary.keys_read, "<f4", 0.0),
        "learned_sink_log_share": (summary.learned_sink_lse - total[..., 0], "<f2", 2e-3),
    }
    if not sinks:
        assert packed.learned_sink_log_share == b""
        del expected["learned_sink_log_share"]
    for name, (array, kind, tolerance) in expected.items():
        wanted = array[:, keep].swapaxes(0, 1).astype(kind)
        found = np.frombuffer(getattr(packed, name), kind).reshape(wanted.shape)
        assert found == pytest.approx(wanted, rel=tolerance), name
    assert packed.request_ids == ["r4", "r1", "r2"]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("strategy", ["descent", "beam", "exact"])
def test_estimates_of_every_context_length_are_sound(strategy: str, sinks: bool) -> None:
    config = SearchConfig(strategy=strategy, top_k=4)
    case = Case(config, CONTEXTS, grid=False, softcap=30.0, sinks=sinks)
    inputs = draw(case)
    found = reference.search(
        inputs.queries, inputs.keys, inputs.block_tables, torch.as_tensor(inputs.context_lens), config
    )
    labels = [
        RowLabel(
            request_id=f"r{index}",
            position=context - 1,
            attempt=0,
            phase=Phase.DECODE,
            refused_reason="",
            sampled=True,
        )
        for index, context in enumerate(CONTEXTS)
    ]
    packed = pack_rows(found, labels, list(range(len(CONTEXTS))))
    fields = {name: getattr(packed, name) for name in summary_pb2.Rows.DESCRIPTOR.fields_by_name if name != "count"}
    info = engine(
        layers=range(case.layers),
        heads=range(case.total_heads),
        geometry=summary_pb2.BlockGeometry(
            block_size=config.block_size,
            top_k=config.top_k,
            sink_blocks=config.sink_blocks,
            recent_blocks=config.recent_blocks,
            strategy=strategy,
        ),
    )
    rows = decode(summary_pb2.Rows(count=len(CONTEXTS), **fields), info, ())
    for row, context in zip(rows, CONTEXTS, strict=True):
        assert row.keys.max() < context
        lost = np.exp(found.learned_sink_lse - found.total_lse())[:, int(row.request_id[1:])].sum()
        assert (lost > 0) == sinks
        assert row.mass.sum() + row.unobserved + lost == pytest.approx(row.heads, rel=0.01)
        assert row.heads == case.layers * case.total_heads
    assert not rows[0].keys.any()
    assert np.isclose(rows[0].unobserved, 0)
