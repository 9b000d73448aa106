"""The arithmetic of `benchmarks.recall`."""

import math

import pytest
import torch

from benchmarks.attention import Attention
from benchmarks.recall.account import Case, margin, one_setting, targets
from benchmarks.recall.frontier import at_budget, frontier, interpolated
from benchmarks.recall.peers import by_maximum, by_sum, flat_scores, published, shared
from benchmarks.recall.points import Measured
from benchmarks.recall.truth import Figures, Judge, Truth
from stream_kernels.search import SearchConfig

POINTS = [(0.02, 0.5), (0.04, 0.7), (0.05, 0.6), (0.10, 0.9)]


def test_the_frontier_leaves_out_what_a_cheaper_point_reaches() -> None:
    assert frontier(POINTS) == [(0.02, 0.5), (0.04, 0.7), (0.10, 0.9)]
    assert frontier([(0.1, 0.4), (0.1, 0.6)]) == [(0.1, 0.6)]


@pytest.mark.parametrize(
    ("reads", "value"), [(0.01, None), (0.02, 0.5), (0.03, 0.6), (0.07, 0.8), (0.10, 0.9), (0.5, 0.9)]
)
def test_the_frontier_is_linear_between_points_and_level_beyond(reads: float, value: float | None) -> None:
    assert interpolated(POINTS, reads) == pytest.approx(value)


@pytest.mark.parametrize(
    ("budget", "value"),
    [
        (0.0185, 0.5),  # 0.02 is within 10%
        (0.038, 0.7),
        (0.052, 0.7),  # 0.05 is near, but a cheaper point is better
        (0.07, 0.8),  # none is near
        (0.016, None),
    ],
)
def test_a_budget_takes_the_best_point_near_it(budget: float, value: float | None) -> None:
    assert at_budget(POINTS, budget) == pytest.approx(value)


def a_point(method: str, setting: str, reads: float, inner: float) -> Measured:
    return Measured(method, setting, 8, reads, Figures(inner, inner, inner, 1.0, 1.0, 0.0, 0.0))


def a_case(text: str, *points: Measured) -> Case:
    return Case("model", 8000, text, 8000, 7, list(points))


def test_the_margin_is_over_the_best_rival() -> None:
    case = a_case(
        "prose", a_point("beam", "", 0.04, 0.9), a_point("mean", "", 0.04, 0.8), a_point("descent", "", 0.04, 0.85)
    )
    found = margin(case, 8, 0.04)
    assert found is not None
    assert (found.value, found.rival) == (pytest.approx(0.05), "descent")
    assert margin(case, 8, 0.01) is None, "nobody reads as little"


def test_beam_loses_a_budget_that_only_a_rival_can_keep() -> None:
    found = margin(a_case("prose", a_point("beam", "", 0.04, 0.9), a_point("mean", "", 0.02, 0.6)), 8, 0.02)
    assert found is not None
    assert found.value == pytest.approx(-0.6)


def test_one_setting_has_to_serve_every_text() -> None:
    first = a_case("a", a_point("beam", "x", 0.05, 0.99), a_point("beam", "y", 0.03, 0.90))
    second = a_case("b", a_point("beam", "x", 0.07, 0.99), a_point("beam", "y", 0.03, 0.80))
    found = one_setting([first, second], 8, 0.06)
    assert found is not None
    assert (found.setting, found.worst, found.reads) == ("y", 0.80, 0.03)
    assert one_setting([first, second], 8, 0.02) is None


def test_targets_follow_the_group_and_the_length() -> None:
    assert targets(3, 7_000) == [(0.12, 0.95)]
    assert targets(7, 16_000) == [(0.06, 0.95), (0.03, 0.90)]
    assert targets(7, 32_000) == [(0.04, 0.95), (0.02, 0.90)]


@pytest.fixture(scope="module")
def attention() -> Attention:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 16, 4, 8, generator=generator).bfloat16()
    keys = (2 * torch.randn(2, 2, 650, 8, generator=generator)).bfloat16()
    return Attention(queries, keys, 8**-0.5)


def test_exact_attention_by_block(attention: Attention) -> None:
    config = SearchConfig()
    truth = Truth.of(attention, config)
    layer, row, head = 1, 3, 2
    context = 650 - 16 + 1 + row
    logits = (
        attention.scale
        * attention.keys[layer, head // 2, :context].float()
        @ attention.queries[layer, row, head].float()
    )
    shares = torch.nn.functional.pad(logits.softmax(0), (0, 21 * 32 - context)).unflatten(0, (21, 32)).sum(1)
    assert truth.inner[row].nonzero().flatten().tolist() == list(range(1, 18))
    torch.testing.assert_close(truth.inner_mass[layer, row, head][1:18], shares[1:18])
    assert not truth.inner_mass[layer, row, head][18:].any()
    assert truth.forced_keys(config).tolist()[row] == context - 17 * 32


def test_the_heaviest_blocks_have_full_recall_and_none_has_none(attention: Attention) -> None:
    truth = Truth.of(attention, SearchConfig())
    judge = Judge(truth, 4)
    best = truth.inner_mass.topk(4, -1).indices
    unobserved = truth.inner_mass.sum(-1) - truth.inner_mass.topk(4, -1).values.sum(-1)
    figures = judge.figures(best, unobserved + 0.01)
    assert (figures.inner, figures.inner_by_row) == (pytest.approx(1.0), pytest.approx(1.0))
    assert (figures.unobserved_bias, figures.unobserved_error) == (pytest.approx(0.01), pytest.approx(0.01))
    nothing = judge.figures(torch.full_like(best, -1))
    assert (nothing.inner, nothing.inner_by_row, nothing.heavy, nothing.heavy_worst) == (0.0, 0.0, 0.0, 0.0)
    assert math.isnan(nothing.unobserved_error)


def test_the_bound_is_one_and_the_mean_is_the_mean(attention: Attention) -> None:
    config = SearchConfig()
    truth = Truth.of(attention, config)
    flat = flat_scores(attention, truth, config)
    keys = attention.keys.float()[:, :, : 20 * 32].unflatten(2, (20, 32)).repeat_interleave(2, 1)
    logits = torch.einsum("lrhd,lhbtd->lrhbt", attention.queries.float() * attention.scale, keys)
    inside = truth.inner[0, :20]
    assert (flat["min/max"].scores[:, 0, :, :20] >= logits[:, 0].amax(-1) - 1e-4)[..., inside].all()
    torch.testing.assert_close(
        flat["mean"].scores[:, 0, :, :20][..., inside], logits[:, 0].mean(-1)[..., inside], atol=1e-4, rtol=1e-4
    )


def test_peers_count_their_reads_as_the_product_does(attention: Attention) -> None:
    config = SearchConfig(top_k=4)
    truth = Truth.of(attention, config)
    flat = flat_scores(attention, truth, config)["min/max"]
    context, inner = truth.contexts.double(), truth.inner.sum(1).double()
    forced = context - inner * 32
    ids, reads = published(flat, truth, config)
    assert ids.shape == (2, 16, 4, 4)
    assert reads == pytest.approx(float(((2 * inner + 4 * 32 + forced) / context).mean()), rel=1e-5)
    for share in (by_maximum, by_sum):
        ids, reads = shared(flat, truth, config, 2, 3, share)
        assert reads == pytest.approx(float(((2 * inner + 12 * 32 + forced) / 2 / context).mean()), rel=1e-5)
        both = [set(ids[0, 0, head].tolist()) for head in (0, 1)]
        assert len(both[0] | both[1]) <= 12
        everything, _ = shared(flat, truth, config, 2, 64, share)
        assert Judge(truth, 4).figures(everything).inner == pytest.approx(1.0)
