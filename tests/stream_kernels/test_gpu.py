"""The search on a GPU does what the reference says: interpreted where there is no GPU, compiled where there is one."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from stream_kernels.gpu import ROW_INVALID, ROW_OK, GpuSearch
from stream_kernels.gpu_keys import load_keys
from stream_kernels.index import levels_for
from stream_kernels.layout import DeviceKeys
from stream_kernels.search import NO_BLOCK, SearchConfig
from stream_kernels.statistics import pyramid

from .gpu_cases import DEVICE, GpuCase, build, level_offsets, number_nodes, run_gpu, run_reference, same_inputs
from .test_parity import assert_same

HND = "pages, keys and values, heads, tokens"
NHD = "keys and values, pages, tokens"

PAPER = SearchConfig.paper(top_k=4)
SHARED = SearchConfig(top_k=4, width=2)
EXACT = SearchConfig(strategy="exact", top_k=4)
BEAM = SearchConfig(strategy="beam", top_k=4, width=6, box_width=4, min_gain=0.002)
SHORT = (700, 33)
ONE_HEAD = {"kv_heads": 1, "layers": 1}

CASES = {
    "exact": GpuCase(EXACT, (900, 1, 0, 64), kv_heads=1),
    "exact, keys after values": GpuCase(EXACT, SHORT, form=HND, page_size=16),
    "the paper's descent": GpuCase(PAPER, (2000, 129), **ONE_HEAD),
    "shared descent": GpuCase(SHARED, (2000, 0, 300), layers=1, form=NHD),
    "descent, not re-ranked": GpuCase(SearchConfig(width=3, top_k=4, rerank=False), (1777, 500), **ONE_HEAD),
    "descent, not re-ranked, all keys": GpuCase(
        SearchConfig(width=2, top_k=3, probe_keys=16, block_size=16, share_kv_group=False, rerank=False),
        (700,),
        kv_heads=1,
        group=2,
        layers=1,
    ),
    "descent, odd probes": GpuCase(SearchConfig(width=2, top_k=5, probe_keys=7), (1500,), **ONE_HEAD),
    "descent, soft cap and sinks": GpuCase(SHARED, (1500, 0), kv_heads=1, softcap=6.0, sinks=True),
    "beam of one level": GpuCase(replace(BEAM, box_width=96), (2500, 200), kv_heads=1),
    "beam of three levels": GpuCase(
        replace(BEAM, block_size=8, box_width=2, upper_width=1), (1700, 0, 777), **ONE_HEAD
    ),
    "beam, early stop": GpuCase(replace(BEAM, min_gain=0.02), (2500,), **ONE_HEAD),
    "beam, never stops": GpuCase(replace(BEAM, min_gain=0.0), (2500,), **ONE_HEAD),
    "beam, not re-ranked": GpuCase(replace(BEAM, rerank=False), (1200,), **ONE_HEAD),
    "beam, the uncertain first": GpuCase(replace(BEAM, spread_weight=3.0), (2500,), **ONE_HEAD),
    "beam, no outliers": GpuCase(replace(BEAM, outlier_share=0.0), (2500,), **ONE_HEAD),
    "beam, a few outliers": GpuCase(replace(BEAM, outlier_share=0.1, block_size=8, box_width=6), (1700,), **ONE_HEAD),
    "beam, every outlier": GpuCase(replace(BEAM, outlier_share=1.0, block_size=8), (1700,), **ONE_HEAD),
    "beam, every outlier, soft cap": GpuCase(
        replace(BEAM, outlier_share=1.0, block_size=8), (1700,), **ONE_HEAD, softcap=2.0
    ),
    "beam, two outliers a node": GpuCase(
        replace(BEAM, outlier_share=1.0, outlier_keys=2, block_size=8, box_width=6), (1700,), **ONE_HEAD, softcap=2.0
    ),
    "beam, every outlier, one query head": GpuCase(replace(BEAM, outlier_share=1.0), (2500,), **ONE_HEAD, group=1),
    "beam, a single recent key": GpuCase(replace(BEAM, recent_blocks=1), (1281,), **ONE_HEAD),
    "beam, wider than the context": GpuCase(replace(BEAM, width=256, min_gain=0.0), (1300, 400), **ONE_HEAD),
    "descent, wider than the context": GpuCase(
        SearchConfig(width=256, top_k=4, rerank=False), (1300, 400, 60), **ONE_HEAD
    ),
    "beam, narrow": GpuCase(replace(BEAM, width=1, box_width=1), (2100,), **ONE_HEAD),
    "beam, each head for itself": GpuCase(replace(BEAM, share_kv_group=False), (1200,), **ONE_HEAD),
    "beam, many sinks, small blocks": GpuCase(
        replace(BEAM, block_size=8, sink_blocks=9, recent_blocks=5, box_width=2), (900,), **ONE_HEAD, page_size=64
    ),
    "beam, no sinks, pages of two blocks": GpuCase(
        replace(BEAM, sink_blocks=0), (1500,), **ONE_HEAD, page_size=64, form=NHD
    ),
    "beam, blocks of eight pages": GpuCase(
        replace(BEAM, block_size=128, top_k=2), (3000,), **ONE_HEAD, page_size=16, form=HND
    ),
    "beam, soft cap": GpuCase(BEAM, (1500,), kv_heads=1, softcap=6.0),
    "beam, learned sinks": GpuCase(BEAM, (1500,), kv_heads=1, sinks=True, form=HND),
    "beam, two block tables": GpuCase(BEAM, (1200, 300), kv_heads=1, tables=2, page_size=16),
    "beam, pages of 128": GpuCase(BEAM, (1500, 90), page_size=128, layers=1, form=HND),
    "beam, some heads, out of order": GpuCase(BEAM, (1300,), kv_heads=3, query_heads=(7, 0, 8, 1), layers=1),
    "beam, one query head": GpuCase(BEAM, (1300,), **ONE_HEAD, group=1),
    "beam, seven query heads": GpuCase(BEAM, (1300,), **ONE_HEAD, group=7),
    "beam, eight query heads, head size 80": GpuCase(BEAM, (1300,), **ONE_HEAD, group=8, head_dim=80),
    "beam, head size 112": GpuCase(BEAM, (1300,), **ONE_HEAD, head_dim=112, page_size=16),
    "beam, sixteen query heads, head size 128": GpuCase(BEAM, (1300,), **ONE_HEAD, group=16, head_dim=128),
    "beam, head size 256": GpuCase(BEAM, (1300,), **ONE_HEAD, head_dim=256),
    "beam, float16": GpuCase(BEAM, (1300,), **ONE_HEAD, dtype=torch.float16),
    "beam, float32": GpuCase(BEAM, (1300,), **ONE_HEAD, dtype=torch.float32),
    "beam, float32 queries on float8_e5m2": GpuCase(
        BEAM, (1300,), **ONE_HEAD, query_dtype=torch.float32, key_dtype=torch.float8_e5m2
    ),
    "beam, float8_e4m3fn": GpuCase(BEAM, (1300,), **ONE_HEAD, key_dtype=torch.float8_e4m3fn, form=NHD),
    "beam, more programs than units": GpuCase(BEAM, (1300, 40), **ONE_HEAD, max_programs=64),
    "beam, a multiprocessor to each program": GpuCase(BEAM, (1300, 40), **ONE_HEAD, max_programs=1),
    "beam, defaults": GpuCase(SearchConfig(strategy="beam"), (3000,), **ONE_HEAD),
}


@pytest.mark.parametrize("name", CASES)
def test_gpu_matches_reference(name: str) -> None:
    case = CASES[name]
    inputs = same_inputs(case)
    found, on_device = run_gpu(case, inputs)
    expected = run_reference(case, inputs)
    assert_same(found, expected)
    assert on_device.status.tolist()[: len(case.contexts)] == [ROW_OK] * len(case.contexts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("strategy", ["descent", "beam"])
def test_gpu_matches_reference_on_continuous_values(strategy: str, dtype: torch.dtype) -> None:
    """Seeds are fixed: on such values a decision within rounding of a tie may fall either way."""
    config = replace(BEAM if strategy == "beam" else SHARED, top_k=3)
    case = GpuCase(config, (1500,), **ONE_HEAD, grid=False, dtype=torch.float32, key_dtype=dtype)
    inputs = same_inputs(case)
    found, _ = run_gpu(case, inputs)
    assert_same(found, run_reference(case, inputs))


def test_the_cases_exercise_what_they_name() -> None:
    """Three levels, and early stops."""
    three = CASES["beam of three levels"]
    assert levels_for(three.config, max(three.contexts)).count == 3
    reads = {
        gain: run_reference(CASES[name], same_inputs(CASES[name])).keys_read.sum()
        for gain, name in ((0.02, "beam, early stop"), (0.0, "beam, never stops"))
    }
    assert reads[0.02] < reads[0.0]


def test_equal_scores_fall_to_the_lower_block() -> None:
    for config in (SHARED, BEAM):
        case = GpuCase(config, (1500,), **ONE_HEAD)
        inputs = same_inputs(case)
        flat = replace(inputs, queries=torch.zeros_like(inputs.queries))
        found, _ = run_gpu(case, flat)
        np.testing.assert_array_equal(found.block_ids, run_reference(case, flat).block_ids)
        assert (np.diff(found.block_ids, axis=-1) > 0).all()
        assert (found.strongest == 0).all()


@dataclass(frozen=True)
class TypeAlone:
    """The part of a `Shape` that decoding looks at."""

    key_type: str
    dot_type: str = "float32"


@triton.jit
def decode_kernel(stored, out, SHAPE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, 256)
    tl.store(out + place, load_keys(stored + place, place < 256, "float32", SHAPE))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_number_an_8_bit_cache_holds_is_read(dtype: torch.dtype) -> None:
    stored = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(256, device=DEVICE)
    decode_kernel[(1,)](stored, out, TypeAlone(str(dtype).removeprefix("torch.")))
    expected = stored.view(dtype).float()
    assert torch.equal(out[expected.isfinite()], expected[expected.isfinite()])


def test_rows_that_cannot_be_read_are_marked_and_read_nowhere() -> None:
    case = GpuCase(BEAM, (700, 700, 700, 700), **ONE_HEAD)
    inputs = same_inputs(case)
    searcher, slots = build(case, inputs)
    assert slots is not None
    inputs.block_tables[0, 0, 0] = 10**6  # a sink page, which is read by every search
    inputs.context_lens[1] = 701
    slots[2] = -1
    out = searcher.allocate_result()
    searcher.run(inputs.queries, inputs.block_tables, inputs.context_lens, inputs.rows, out, slots)
    assert out.status.tolist() == [ROW_INVALID, ROW_INVALID, ROW_INVALID, ROW_OK, ROW_OK]
    expected = run_reference(case, same_inputs(case))
    np.testing.assert_array_equal(out.on_host().block_ids[:, 3], expected.block_ids[:, 3])
    inputs.context_lens[1] = 700
    inputs.block_tables[0, 0, 0] = same_inputs(case).block_tables[0, 0, 0]
    _, again = build(case, inputs)
    searcher.run(inputs.queries, inputs.block_tables, inputs.context_lens, inputs.rows, out, again)
    assert out.status.tolist() == [ROW_OK] * 5


def test_rows_beyond_the_count_are_left_alone() -> None:
    case = GpuCase(EXACT, (300, 200), **ONE_HEAD)
    inputs = same_inputs(case)
    searcher, _ = build(case, inputs)
    out = searcher.allocate_result()
    out.block_ids.fill_(77)
    inputs.rows.fill_(1)
    searcher.run(inputs.queries, inputs.block_tables, inputs.context_lens, inputs.rows, out)
    assert (out.block_ids[:, 0] != 77).all()
    assert (out.block_ids[:, 1:] == 77).all()


@pytest.mark.parametrize("outlier_keys", [1, 2, 3])
def test_summaries_are_those_of_the_reference(outlier_keys: int) -> None:
    """Slot by slot, on numbers where rounding to bfloat16 matters."""
    config = replace(BEAM, block_size=8, box_width=1, sink_blocks=3, outlier_keys=outlier_keys)
    case = GpuCase(config, (1300,), kv_heads=2, grid=False, dtype=torch.float32, page_size=16, form=HND)
    inputs = same_inputs(case)
    searcher, _ = build(case, inputs)
    assert searcher.levels == 3
    _, jobs = number_nodes(case)
    for layer, keys in enumerate(inputs.keys):
        pages = inputs.block_tables[keys.table, 0, : -(-1300 // 16)]
        logical = keys.gather(pages)[: 1300 // 8 * 8].transpose(0, 1).unflatten(1, (-1, 8))
        levels = pyramid(logical, searcher.levels, config.sink_blocks, config.outlier_keys)
        for level, slot, _, node in jobs.tolist():
            if level >= searcher.levels:
                continue
            vectors = searcher.summaries[layer, slot].double()
            mean, outliers = vectors[:, 0], vectors[:, 1:]
            want = levels[level].mean[:, node]
            # Sums are taken in float32: a number in the middle between two of bfloat16 may go to either.
            torch.testing.assert_close(mean, want, atol=1e-6, rtol=2.0**-7)
            assert (mean == want).double().mean() > 0.97
            assert torch.equal(outliers, levels[level].outliers[:, node])
            spread = searcher.spreads[layer, slot].double()
            torch.testing.assert_close(spread, levels[level].spread[:, node], atol=0.0, rtol=1e-4)


def test_of_keys_equally_far_the_first_is_the_outlier() -> None:
    """Keys of opposite signs in turn, and so are blocks: all are as far from 0, where every node has its mean."""
    case = GpuCase(replace(BEAM, block_size=8, box_width=1, sink_blocks=0), (1300,), **ONE_HEAD)
    inputs = same_inputs(case)
    place = torch.arange(case.page_size)
    sign = (-1.0) ** (place + place // 8)
    inputs.keys[0].tensor[inputs.block_tables[0, 0].long()] = sign[:, None, None].bfloat16().to(DEVICE)
    searcher, slots = build(case, inputs)
    assert slots is not None
    offsets = level_offsets(case)
    end = -(-1300 // 8) - case.config.recent_blocks
    for level in range(searcher.levels):
        count = end // 8**level
        mean, outlier = searcher.summaries[0, slots[0, offsets[level] : offsets[level] + count].long(), 0].unbind(1)
        assert (mean == 0).all()
        first = (-1.0) ** torch.arange(count) if level == 0 else torch.ones(count)
        assert torch.equal(outlier.float().cpu(), first[:, None].expand(-1, case.head_dim))


def test_result_copies_at_once() -> None:
    case = GpuCase(EXACT, (300,), **ONE_HEAD)
    inputs = same_inputs(case)
    _, out = run_gpu(case, inputs)
    copy = type(out).allocate(1, 2, case.total_heads, 1, case.config, "cpu")
    copy.copy_(out)
    for name, array in vars(out.on_host()).items():
        np.testing.assert_array_equal(getattr(copy.on_host(), name), array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": SearchConfig(strategy="exact", top_k=65)}, "top_k is 65; on a GPU at most 64"),
        (
            {"config": SearchConfig(width=256, top_k=9), "max_context": 50000},
            "width \\* top_k is 2304; on a GPU at most 512, where max_context has more inner blocks",
        ),
        (
            {"config": BEAM},
            "summary_slots is 0.*level_offsets are \\[\\]; the levels need room for",
        ),
        ({"query_dtype": torch.float64}, "queries are torch.float64"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"max_context": 0}, "max_context 0"),
        ({"keys": []}, "no layers"),
        ({"total_query_heads": 7}, "7 query heads do not divide among 2 KV heads"),
        ({"total_query_heads": 34}, "17 query heads share a KV head; at most 16 may"),
        ({"query_heads": [0, 0]}, "must be distinct"),
        ({"max_programs": 0}, "max_programs 0 must be positive"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {
        "keys": [DeviceKeys(torch.zeros(4, 16, 2, 64, dtype=torch.bfloat16, device=DEVICE), 0.125)],
        "total_query_heads": 6,
        "config": SHARED,
        "max_rows": 2,
        "max_context": 5000,
        "query_dtype": torch.bfloat16,
    }
    with pytest.raises(ValueError, match=message):
        GpuSearch(**(settings | changes))  # type: ignore[arg-type]


def test_layers_that_differ_are_refused_together() -> None:
    first = torch.zeros(4, 16, 2, 64, dtype=torch.bfloat16)
    layers = [
        DeviceKeys(first, 1.0),
        DeviceKeys(first.half(), 1.0),
        DeviceKeys(torch.zeros(4, 16, 2, 68, dtype=torch.bfloat16)[..., 1:65], 1.0),
        DeviceKeys(first, 1.0, table=-1, sinks=torch.zeros(8)),
    ]
    with pytest.raises(ValueError, match="layer 1 has another") as raised:
        GpuSearch(layers, 6, SHARED, max_rows=1, max_context=64, query_dtype=torch.float16)
    for part in (
        "layer 2 has keys that do not start at a multiple of 16 bytes",
        "layer 3 names block table -1",
        "layer 3 has 8 learned sinks for 6 query heads",
    ):
        assert part in str(raised.value)


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = GpuCase(BEAM, (300,), **ONE_HEAD)
    inputs = same_inputs(case)
    searcher, slots = build(case, inputs)
    out = searcher.allocate_result()
    good = (inputs.queries, inputs.block_tables, inputs.context_lens, inputs.rows, out, slots)
    bad = {
        "queries are": (0, inputs.queries.float()),
        "block_tables are": (1, inputs.block_tables[:, :, :2]),
        "context_lens is": (2, inputs.context_lens.long()),
        "rows is": (3, inputs.rows[:0]),
        "out is for": (4, type(out).allocate(1, 1, 1, 1, case.config, DEVICE)),
        "node_slots are": (5, slots[:, :1] if slots is not None else None),
        "beam needs node_slots": (5, None),
    }
    for message, (place, value) in bad.items():
        arguments = [value if index == place else argument for index, argument in enumerate(good)]
        with pytest.raises(ValueError, match=message):
            searcher.run(*arguments)  # type: ignore[arg-type]


def test_new_factors_and_learned_sinks_are_used() -> None:
    case = GpuCase(EXACT, (300,), kv_heads=1, sinks=True)
    inputs = same_inputs(case)
    searcher, _ = build(case, inputs)
    out = searcher.allocate_result()
    new = torch.tensor([3.0, 1.0, 2.0], device=DEVICE)
    scales = [0.3, inputs.keys[1].scale]
    searcher.set_logit_weights(scales, [None, new])
    searcher.run(inputs.queries, inputs.block_tables, inputs.context_lens, inputs.rows, out)
    assert out.learned_sink_lse[:, 0].tolist() == [[-np.inf] * 3, [3.0, 1.0, 2.0]]
    changed = [replace(inputs.keys[0], scale=0.3), inputs.keys[1]]
    truth = run_reference(case, replace(inputs, keys=changed))
    np.testing.assert_allclose(out.on_host().forced_lse[0, :1], truth.forced_lse[0], atol=1e-4)
    with pytest.raises(ValueError, match="expected float32"):
        searcher.set_logit_weights(scales, [None, new.double()])


def test_nothing_is_found_where_there_is_nothing() -> None:
    case = GpuCase(SHARED, (0, 32), **ONE_HEAD)
    found, _ = run_gpu(case, same_inputs(case))
    assert (found.block_ids == NO_BLOCK).all()
    assert (found.keys_read[:, 0] == 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("config", [EXACT, SHARED, BEAM], ids=lambda config: config.strategy)
def test_a_search_in_a_cuda_graph_follows_its_inputs(config: SearchConfig) -> None:
    """Captured once, replayed for queries and lengths that were written into the same buffers since."""
    case = GpuCase(config, (1500, 1500), kv_heads=1)
    inputs = same_inputs(case)
    searcher, slots = build(case, inputs)
    out = searcher.allocate_result()

    def search() -> None:
        searcher.run(inputs.queries, inputs.block_tables, inputs.context_lens, inputs.rows, out, slots)

    search()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        search()
    inputs.queries.neg_()
    inputs.context_lens[1] = 700
    graph.replay()
    replayed = out.storage.clone()
    out.storage.zero_()
    search()
    assert torch.equal(replayed, out.storage)
    assert out.block_ids.min() >= NO_BLOCK
    assert (out.block_ids[:, 0] != out.block_ids[:, 1]).any()
