"""Figures of fidelity against their definitions."""

from dataclasses import replace

import pytest
import torch
import transformers

from stream_kernels.search import SearchConfig
from stream_monitor.tracing.attention import LayerInputs
from stream_monitor.tracing.fidelity import (
    DenseRun,
    KSearch,
    RestrictedRun,
    dense_run,
    divergence,
    restricted_run,
    search_k,
)
from stream_monitor.tracing.layer import TraceOptions, search_layer
from stream_monitor.tracing.model import TracedModel
from stream_monitor.tracing.pruning import PairCount, count_pairs
from stream_monitor.tracing.sparse_attention import sparse_attention
from tests.tracing import tiny

EXACT = SearchConfig(strategy="exact", block_size=8, top_k=1)
IDS = tiny.tokens(300, seed=3)


@pytest.fixture(scope="module")
def dense(tiny_model: TracedModel) -> DenseRun:
    return dense_run(tiny_model, IDS)


def test_the_dense_run_goes_on_as_transformers_does(tiny_model: TracedModel, dense: DenseRun) -> None:
    own = transformers.AutoModelForCausalLM.from_pretrained(tiny_model.name, attn_implementation="eager")
    expected = own.generate(torch.tensor([IDS]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    assert dense.continuation == expected[0, len(IDS) :].tolist()


def test_a_model_that_keeps_everything_is_the_dense_one(tiny_model: TracedModel, dense: DenseRun) -> None:
    run = restricted_run(tiny_model, dense, SearchConfig(strategy="exact", block_size=8, top_k=64))
    assert run.matched == 16
    assert run.pairs.pruned_of_causal == 0
    found = divergence(tiny_model, dense, run)
    assert found.agreement == 1
    assert abs(found.mean_kl) < 1e-6


def test_divergence_is_taken_at_every_position(
    tiny_model: TracedModel, dense: DenseRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = restricted_run(tiny_model, dense, EXACT)
    expected, found = (tiny_model.logits(part.hidden).double() for part in (dense, run))
    kl = torch.nn.functional.kl_div(found.log_softmax(-1), expected.softmax(-1), reduction="batchmean")
    agreement = (found.argmax(-1) == expected.argmax(-1)).double().mean()
    monkeypatch.setattr("stream_monitor.tracing.model._LOGIT_TOKENS", 64)
    result = divergence(tiny_model, dense, run)
    assert result.agreement == pytest.approx(float(agreement))
    assert result.mean_kl == pytest.approx(float(kl), rel=1e-4)
    assert result.agreement < 0.9
    assert result.mean_kl > 0.01


@pytest.mark.parametrize(("most", "places"), [(1, [299]), (2, [0, 299]), (3, [0, 150, 299]), (400, range(300))])
def test_divergence_of_some_positions_spread_evenly(
    tiny_model: TracedModel, dense: DenseRun, most: int, places: list[int]
) -> None:
    run = restricted_run(tiny_model, dense, EXACT)
    expected, found = (tiny_model.logits(part.hidden[list(places)]).double() for part in (dense, run))
    kl = torch.nn.functional.kl_div(found.log_softmax(-1), expected.softmax(-1), reduction="batchmean")
    result = divergence(tiny_model, dense, run, most)
    assert result.mean_kl == pytest.approx(float(kl), rel=1e-4)
    assert result.agreement == pytest.approx(float((found.argmax(-1) == expected.argmax(-1)).double().mean()))


def test_decoding_is_restricted_too(tiny_model: TracedModel, dense: DenseRun) -> None:
    run = restricted_run(tiny_model, dense, EXACT)
    own = [int(tiny_model.logits(run.hidden[-1:]).argmax())]
    options = TraceOptions(EXACT)
    seen: list[int] = []

    def attend(inputs: LayerInputs) -> torch.Tensor:
        """Of the kept blocks by a square of logits; the context's last row is the first that decodes."""
        found = search_layer(inputs, options)
        if len(inputs.queries) == 1:
            seen.append(inputs.first_query)
        return sparse_attention(inputs, found, EXACT.block_size)

    cache = transformers.DynamicCache()
    tiny_model.run(IDS, attend, cache)
    while len(own) < 6:
        own.append(int(tiny_model.logits(tiny_model.run(own[-1:], attend, cache)).argmax()))
    assert seen[:: tiny_model.layers] == list(range(len(IDS), len(IDS) + 5))
    # A dense run that goes on as the restricted model does is repeated whole; one that leaves it, up to there.
    assert restricted_run(tiny_model, replace(dense, continuation=own), EXACT).matched == 6
    left = [*own[:4], (own[4] + 1) % 256, own[5]]
    assert restricted_run(tiny_model, replace(dense, continuation=left), EXACT).matched == 4


def run_that_matched(tokens: int) -> RestrictedRun:
    return RestrictedRun(torch.zeros(0), tokens, PairCount(), 0.0)


def test_the_smallest_k_is_one_from_which_all_larger_succeed() -> None:
    tried = {k: run_that_matched(n) for k, n in {16: 16, 8: 16, 6: 3, 4: 16, 2: 5, 1: 0}.items()}
    search = KSearch(tried)
    assert (search.smallest(16), search.smallest(3), search.smallest(2)) == (8, 2, 2)
    assert KSearch({4: run_that_matched(1), 2: run_that_matched(16)}).smallest(2) is None


@pytest.mark.parametrize(
    ("smallest", "tried"), [(1, [40, 4, 2, 1]), (2, [40, 4, 2, 1]), (8, [40, 4, 16, 8]), (40, [40, 4, 16]), (64, [40])]
)
def test_the_k_search_tries_the_largest_and_bisects(
    tiny_model: TracedModel,
    dense: DenseRun,
    monkeypatch: pytest.MonkeyPatch,
    smallest: int,
    tried: list[int],
) -> None:
    def run(model: TracedModel, dense: DenseRun, search: SearchConfig, reduction: str) -> RestrictedRun:
        return run_that_matched(16 if search.top_k >= smallest else 15)

    monkeypatch.setattr("stream_monitor.tracing.fidelity.restricted_run", run)
    found = search_k(tiny_model, dense, EXACT, [16, 1, 2, 40, 4, 8, 2])
    assert list(found.tried) == tried
    assert found.smallest(16) == (smallest if smallest <= 40 else None)
    assert found.smallest(15) == min(tried)


def test_more_blocks_prune_less(tiny_model: TracedModel, dense: DenseRun) -> None:
    found = search_k(tiny_model, dense, EXACT, [2, 40])
    assert found.smallest(16) == 40
    assert found.tried[2].pairs.pruned_of_causal > found.tried[40].pairs.pruned_of_causal == 0


@pytest.mark.parametrize("window", [0, 41, 45])
def test_pairs_are_counted_block_by_block(window: int) -> None:
    given = tiny.inputs(203, window=window)
    found = search_layer(given, TraceOptions(EXACT))
    visible = torch.isfinite(tiny.logits(given))[0]
    padded = torch.nn.functional.pad(visible, (0, 5, 0, 5)).unflatten(0, (26, 8)).unflatten(2, (26, 8))
    kept = sum(
        len({*found.block_ids[block, head].tolist(), *found.forced_ids[block].tolist()} - {-1})
        for block in range(26)
        for head in range(6)
    )
    causal = 6 * int(padded.any(1).any(-1).sum())
    assert count_pairs(found, 8, window) == PairCount(kept, causal, 6 * 26 * 26)
