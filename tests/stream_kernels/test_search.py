"""What must hold of any search, and the CPU search's guards and audits."""

import dataclasses
import threading

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_kernels.cpu import ROW_INVALID, ROW_OK, ROW_RACED, CpuSearch
from stream_kernels.cpu_kernel.logits import cap_logits
from stream_kernels.reference import probe_offsets, search_units
from stream_kernels.search import NO_BLOCK, BlockSummary, SearchConfig, forced_block_ids

from .cases import Case, Inputs, draw
from .test_parity import assert_same, run_cpu, run_reference

CASE = Case(SearchConfig(width=2, top_k=4), (3000, 500), grid=False, dtype=torch.float32)


def dense_logits(case: Case, inputs: Inputs, layer: int, row: int, head: int) -> np.ndarray:
    keys = inputs.keys[layer]
    context = case.contexts[row]
    pages = inputs.block_tables[keys.table][row, : -(-context // case.page_size)]
    row_keys = keys.gather(pages)[:context, head // case.group]
    logits = (row_keys @ inputs.queries[layer, row, head].double() * keys.scale).numpy()
    return keys.softcap * np.tanh(logits / keys.softcap) if keys.softcap else logits


def kept_mass(summary: BlockSummary) -> np.ndarray:
    return np.logaddexp.reduce(summary.block_lse, axis=-1)


@settings(max_examples=25, deadline=None)
@given(
    strategy=st.sampled_from(["descent", "beam", "exact"]),
    context=st.integers(1, 1500),
    block_size=st.sampled_from([8, 16, 32]),
    top_k=st.integers(1, 12),
    width=st.integers(1, 3),
    sink=st.integers(0, 3),
    recent=st.integers(1, 3),
    shared=st.booleans(),
    rerank=st.booleans(),
    softcap=st.sampled_from([0.0, 4.0, 50.0]),
    learned_sinks=st.booleans(),
)
def test_a_summary_describes_dense_attention(
    strategy: str,
    context: int,
    block_size: int,
    top_k: int,
    width: int,
    sink: int,
    recent: int,
    shared: bool,
    rerank: bool,
    softcap: float,
    learned_sinks: bool,
) -> None:
    config = SearchConfig(strategy, block_size, top_k, sink, recent, 2, width, shared, rerank)  # type: ignore[arg-type]
    case = Case(config, (context,), layers=1, dtype=torch.float32, head_dim=16, grid=False)
    inputs = draw(dataclasses.replace(case, softcap=softcap, sinks=learned_sinks))
    sinks = inputs.keys[0].sinks
    found = run_reference(case, inputs)
    forced = forced_block_ids(context, config)
    blocks = -(-context // block_size)
    for head in range(case.total_heads):
        logits = dense_logits(case, inputs, 0, 0, head)
        masses = [logits[b * block_size : (b + 1) * block_size] for b in range(blocks)]
        lse = [np.logaddexp.reduce(mass) for mass in masses]
        ids = [b for b in found.block_ids[0, 0, head] if b != NO_BLOCK]
        assert len(ids) == len(set(ids)) == min(top_k, max(0, blocks - sink - recent))
        assert not set(ids) & set(forced)
        assert (np.diff(found.block_lse[0, 0, head, : len(ids)]) <= 0).all()
        np.testing.assert_allclose(found.block_lse[0, 0, head, : len(ids)], [lse[b] for b in ids], atol=1e-5)
        assert [masses[b].argmax() for b in ids] == found.strongest[0, 0, head, : len(ids)].tolist()
        expected = [lse[b] if b != NO_BLOCK else -np.inf for b in forced]
        np.testing.assert_allclose(found.forced_lse[0, 0, head], expected, atol=1e-5)
        if strategy == "exact":
            total = np.logaddexp.reduce([*logits, -np.inf if sinks is None else float(sinks[head])])
            np.testing.assert_allclose(found.total_lse()[0, 0, head], total, atol=1e-5)
        if len(ids) == blocks - len(set(forced) - {NO_BLOCK}):
            assert found.unobserved_lse[0, 0, head] == -np.inf


@pytest.mark.parametrize("softcap", [0.5, 6.0, 50.0])
def test_the_compiled_soft_cap_is_exact_for_small_and_large_logits(softcap: float) -> None:
    sizes = np.geomspace(1e-6, 20 * softcap, 64).astype(np.float32)
    raw = np.concatenate([sizes, -sizes, [0.0, np.float32(1e30)]]).astype(np.float32)
    logits = raw[None].copy()
    numba.njit(lambda *arguments: cap_logits(*arguments))(logits, 1, len(raw), np.float32(softcap))
    expected = softcap * np.tanh(raw.astype(np.float64) / softcap)
    np.testing.assert_allclose(logits[0], expected, rtol=5e-7)


@pytest.mark.parametrize("strategy", ["descent", "beam"])
def test_no_search_keeps_more_than_the_oracle(strategy: str) -> None:
    inputs = draw(CASE)
    oracle = kept_mass(run_reference(CASE.with_config(strategy="exact"), inputs))
    found = kept_mass(run_reference(CASE.with_config(strategy=strategy), inputs))
    assert (found <= oracle + 1e-6).all()
    assert (found < oracle - 1e-3).any()  # the search is narrow enough here for the comparison to mean something


@pytest.mark.parametrize("strategy", ["descent", "beam"])
def test_a_search_wide_enough_is_the_oracle(strategy: str) -> None:
    inputs = draw(CASE)
    oracle = run_reference(CASE.with_config(strategy="exact"), inputs)
    found = run_reference(CASE.with_config(strategy=strategy, width=64, min_gain=0.0), inputs)
    # Knowing that it will read everything, descent scores nothing; beam scores first and reads in that order.
    assert_same(dataclasses.replace(found, keys_read=oracle.keys_read), oracle)


def test_the_unobserved_estimate_is_close_where_blocks_are_alike() -> None:
    """Keys drawn alike everywhere: probe keys then stand for their branch, and the estimate must be near the truth."""
    drawn = draw(CASE)
    # Logits of standard deviation 1: were a few keys to hold most of the mass, four probes a block could not see it.
    inputs = dataclasses.replace(drawn, queries=drawn.queries / 6)
    oracle = run_reference(CASE.with_config(strategy="exact"), inputs)
    for strategy in ("descent", "beam"):
        found = run_reference(CASE.with_config(strategy=strategy), inputs)
        error = np.exp(found.total_lse() - oracle.total_lse()) - 1
        assert abs(error.mean()) < 0.2, strategy


def test_keys_read_of_the_stateless_default() -> None:
    """T = 8,192, N = 253: one round of 253 single blocks (of 256 halves), 128 candidates, 96 forced keys, 3 heads."""
    case = Case(SearchConfig(), (8192,), layers=1, kv_heads=1)
    found = run_reference(case, draw(case))
    assert found.keys_read[0, 0] == pytest.approx((253 * 4 + 128 * 32 + 96) / 3)


def test_probe_keys_are_spread_over_the_block() -> None:
    assert probe_offsets(SearchConfig.paper()) == [16]
    assert probe_offsets(SearchConfig(probe_keys=4)) == [4, 12, 20, 28]
    assert probe_offsets(SearchConfig(probe_keys=32)) == list(range(32))


def test_heads_of_one_kv_head_form_a_unit_only_where_they_share() -> None:
    assert search_units([7, 0, 8, 1], 3, SearchConfig()) == [(0, [1, 3]), (2, [0, 2])]
    assert search_units([7, 0, 8, 1], 3, SearchConfig.paper()) == [(2, [0]), (0, [1]), (2, [2]), (0, [3])]


def test_an_empty_summary_has_no_mass() -> None:
    assert (BlockSummary.allocate(1, 2, 3, SearchConfig()).total_lse() == -np.inf).all()


def searcher_for(case: Case, inputs: Inputs, **changes: object) -> CpuSearch:
    arguments = {"max_rows": len(case.contexts), "max_context": 4096, "query_dtype": inputs.queries.dtype} | changes
    return CpuSearch(inputs.keys, case.total_heads, case.config, **arguments)  # type: ignore[arg-type]


def test_a_row_is_dropped_when_one_of_its_pages_was_reused() -> None:
    inputs = draw(CASE)
    searcher = searcher_for(CASE, inputs)
    out = BlockSummary.allocate(2, 2, 6, CASE.config)
    tables = [table.numpy() for table in inputs.block_tables]
    generations = np.zeros(inputs.keys[0].num_pages, np.int64)
    snapshots = np.array([5, 5])
    generations[tables[0][0, 17]] = 6
    generations[tables[0][1, 3]] = 5
    status = searcher.run(inputs.queries, tables, inputs.context_lens, out, generations, snapshots)
    assert status.tolist() == [ROW_RACED, ROW_OK]
    assert (out.block_ids[:, 0] == NO_BLOCK).all()
    assert (out.total_lse()[:, 0] == -np.inf).all()
    assert (out.block_ids[:, 1] != NO_BLOCK).all()


def test_pages_of_a_table_that_no_watched_layer_uses_do_not_matter() -> None:
    """As in a model with sliding windows: their table goes on naming pages that belong to others by now."""
    inputs = draw(CASE)
    searcher = searcher_for(CASE, inputs)
    out = BlockSummary.allocate(2, 2, 6, CASE.config)
    used, other = inputs.block_tables[0].numpy(), np.array([[1, -1], [10_000_000, 2]], np.int32)
    generations = np.zeros(inputs.keys[0].num_pages, np.int64)
    generations[[page for page in range(len(generations)) if page not in used]] = 9
    call = (inputs.queries, [used, other], inputs.context_lens, out, generations, np.zeros(2, np.int64))
    assert searcher.run(*call).tolist() == [ROW_OK, ROW_OK]


def test_a_page_reused_during_the_search_is_noticed() -> None:
    """A search of many rows lasts long enough for another thread to change a generation half-way."""
    case = dataclasses.replace(CASE, contexts=(3000,), config=SearchConfig(strategy="exact"))
    inputs, rows = draw(case), 300
    searcher = searcher_for(case, inputs, max_rows=rows)
    out = BlockSummary.allocate(2, rows, 6, case.config)
    generations = np.zeros(inputs.keys[0].num_pages, np.int64)
    call = (
        inputs.queries.repeat(1, rows, 1, 1),
        [inputs.block_tables[0].repeat(rows, 1).numpy()],
        np.full(rows, 3000, np.int32),
        out,
        generations,
        np.zeros(rows, np.int64),
    )
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(searcher.run(*call)))
    thread.start()
    while thread.is_alive() and out.keys_read[0, 1] == 0:  # were the lock held, this would see only the end
        pass
    generations[:] = 1
    thread.join()
    assert statuses[0][0] == ROW_OK
    assert statuses[0][-1] == ROW_RACED


@pytest.mark.parametrize("page", [-1, 10_000_000])
def test_a_page_out_of_range_is_never_followed(page: int) -> None:
    inputs = draw(CASE)
    inputs.block_tables[0][1, 2] = page
    out = BlockSummary.allocate(2, 2, 6, CASE.config)
    tables = [table.numpy() for table in inputs.block_tables]
    status = searcher_for(CASE, inputs).run(inputs.queries, tables, inputs.context_lens, out)
    assert status.tolist() == [ROW_OK, ROW_INVALID]


def test_a_context_longer_than_declared_is_not_searched() -> None:
    inputs = draw(CASE)
    out = BlockSummary.allocate(2, 2, 6, CASE.config)
    tables = [table.numpy() for table in inputs.block_tables]
    status = searcher_for(CASE, inputs, max_context=2999).run(inputs.queries, tables, inputs.context_lens, out)
    assert status.tolist() == [ROW_INVALID, ROW_OK]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 6.0])
def test_an_audit_agrees_with_the_oracle(softcap: float, sinks: bool) -> None:
    inputs = draw(dataclasses.replace(CASE, softcap=softcap, sinks=sinks))
    found, searcher = run_cpu(CASE, inputs)
    oracle = run_reference(CASE.with_config(strategy="exact"), inputs)
    tables = [table.numpy() for table in inputs.block_tables]
    for layer, row, slot in [(0, 0, 0), (0, 1, 3), (1, 0, 4), (1, 1, 5)]:
        audit = searcher.audit(layer, row, slot, inputs.queries, tables, inputs.context_lens, found)
        assert audit is not None
        at = (layer, row, slot)
        assert audit.recall == pytest.approx(np.exp(kept_mass(found)[at] - kept_mass(oracle)[at]), rel=1e-4)
        seen = np.logaddexp(kept_mass(found)[at], np.logaddexp.reduce(found.forced_lse[at]))
        seen = np.logaddexp(seen, found.learned_sink_lse[at])
        truth = 1 - np.exp(seen - oracle.total_lse()[at])
        claim = np.exp(found.unobserved_lse[at] - found.total_lse()[at])
        assert audit.unobserved_error == pytest.approx(claim - truth, abs=1e-5)


def test_new_factors_and_sinks_count_from_the_next_search_on() -> None:
    case = dataclasses.replace(CASE.with_config(strategy="exact"), sinks=True, query_heads=(4, 1))
    inputs = draw(case)
    found, searcher = run_cpu(case, inputs)
    tables = [table.numpy() for table in inputs.block_tables]
    keys = [dataclasses.replace(inputs.keys[0], scale=0.3, sinks=None)]
    keys.append(dataclasses.replace(inputs.keys[1], sinks=torch.linspace(30.0, 10.0, case.total_heads)))
    searcher.set_logit_weights([layer.scale for layer in keys], [layer.sinks for layer in keys])
    searcher.run(inputs.queries, tables, inputs.context_lens, found)
    assert_same(found, run_reference(case, dataclasses.replace(inputs, keys=keys)))
    audit = searcher.audit(1, 0, 1, inputs.queries, tables, inputs.context_lens, found)
    assert audit == pytest.approx((1.0, 0.0), abs=1e-5)


def test_an_exact_summary_audits_as_perfect() -> None:
    case = CASE.with_config(strategy="exact")
    inputs = draw(case)
    found, searcher = run_cpu(case, inputs)
    tables = [table.numpy() for table in inputs.block_tables]
    audit = searcher.audit(1, 1, 3, inputs.queries, tables, inputs.context_lens, found)
    assert audit == pytest.approx((1.0, 0.0), abs=1e-5)


def test_the_audit_of_a_reused_row_is_none() -> None:
    inputs = draw(CASE)
    found, searcher = run_cpu(CASE, inputs)
    tables = [table.numpy() for table in inputs.block_tables]
    generations = np.ones(inputs.keys[0].num_pages, np.int64)
    call = (inputs.queries, tables, inputs.context_lens, found, generations)
    assert searcher.audit(0, 0, 0, *call, np.zeros(2, np.int64)) is None


def test_what_the_cpu_search_cannot_do_is_refused_with_every_reason() -> None:
    case = dataclasses.replace(CASE, head_dim=18, query_heads=(1, 1))
    with pytest.raises(ValueError, match=r"head size 18 is not a multiple of 4.*distinct"):
        run_cpu(case, draw(case))


@pytest.mark.parametrize("wrong", ["queries", "table", "out", "rows", "generations"])
def test_wrong_arguments_are_refused_before_anything_is_read(wrong: str) -> None:
    inputs = draw(CASE)
    searcher = searcher_for(CASE, inputs)
    tables = [table.numpy() for table in inputs.block_tables]
    call = {
        "queries": inputs.queries,
        "block_tables": tables,
        "context_lens": inputs.context_lens,
        "out": BlockSummary.allocate(2, 2, 6, CASE.config),
    }
    call |= {
        "queries": {"queries": inputs.queries.double()},
        "table": {"block_tables": [tables[0].astype(np.int64)]},
        "out": {"out": BlockSummary.allocate(2, 2, 5, CASE.config)},
        "rows": {"context_lens": np.ones(3, np.int32)},
        "generations": {"page_generations": np.zeros(1, np.int64), "row_generations": np.zeros(2, np.int64)},
    }[wrong]
    with pytest.raises(ValueError, match=r"."):
        searcher.run(**call)  # type: ignore[arg-type]
