"""The reference is what an accelerator could run: static shapes, one graph, no look at a value."""

import itertools
import math

import pytest
import torch

from stream_kernels.reference import search_dense
from stream_kernels.search import SearchConfig
from stream_kernels.statistics import FANOUT, log_mean_exp, pyramid, spread_limit, spread_profile, top_level

CONFIGS = {
    "descent": SearchConfig(strategy="descent", width=3),
    "paper": SearchConfig.paper(),
    "beam": SearchConfig(strategy="beam", width=6, box_width=4),
    "exact": SearchConfig(strategy="exact"),
}


def drawn(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(tokens)
    return (
        torch.randn(3, 2, 16, generator=rng),
        torch.randn(3, tokens, 16, generator=rng),
        torch.ones(3, 2, dtype=torch.bool),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_serves_every_context(name: str) -> None:
    queries, keys, heads = drawn(4000)
    config = CONFIGS[name]
    torch.compiler.reset()
    compiled = torch.compile(search_dense, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        for contexts in ([4000, 3000, 700], [1, 100, 2345]):
            lens = torch.tensor(contexts)
            found = compiled(queries, keys, lens, heads, None, 0.0, config)
            expected = search_dense(queries, keys, lens, heads, None, 0.0, config)
            for field, value in vars(expected).items():
                torch.testing.assert_close(getattr(found, field), value, msg=f"{field} at {contexts}")


def test_rows_searched_together_are_searched_as_alone() -> None:
    queries, keys, heads = drawn(4000)
    for config in CONFIGS.values():
        contexts = [4000, 90, 2999]
        both = search_dense(queries, keys, torch.tensor(contexts), heads, None, 0.0, config)
        for row, context in enumerate(contexts):
            one = slice(row, row + 1)
            alone = search_dense(
                queries[one], keys[one, :context], torch.tensor([context]), heads[one], None, 0.0, config
            )
            for field, value in vars(alone).items():
                torch.testing.assert_close(getattr(both, field)[one], value, msg=f"{field} of {config.strategy}")


@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("count", [32, 256])
def test_log_mean_exp_of_gaussian_logits(deviation: float, count: int) -> None:
    """Near the average over draws; where exp(var / 2) is wrong by orders of magnitude, by half a deviation at most."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, count, generator=rng, dtype=torch.float64) * deviation
    truth = float((logits.logsumexp(-1) - math.log(count)).mean())
    told = float(log_mean_exp(torch.zeros(()), torch.tensor(deviation**2), torch.tensor(float(count))))
    assert abs(told - truth) < 0.5 * deviation
    if deviation == 8:
        assert abs(told - truth) < 0.5 * abs(deviation**2 / 2 - truth)


def test_log_mean_exp_has_no_step() -> None:
    count = torch.tensor(32.0)
    limit = spread_limit(count).square()
    below, above = (log_mean_exp(torch.zeros(()), limit * factor, count) for factor in (1 - 1e-6, 1 + 1e-6))
    assert float(above) == pytest.approx(float(below), rel=1e-5)


@pytest.mark.parametrize("sink_blocks", [0, 1, 9])
def test_a_node_has_the_statistics_of_its_keys(sink_blocks: int) -> None:
    keys = torch.randn(1, 130, 32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for level, nodes in enumerate(pyramid(keys, 3, sink_blocks)):
        span = FANOUT**level
        assert len(nodes.blocks) == 130 // span
        for node in range(len(nodes.blocks)):
            own = keys[:, max(node * span, sink_blocks) : (node + 1) * span].flatten(1, 2)
            assert nodes.blocks[node] * 32 == own.shape[1]
            if own.shape[1]:  # to bfloat16, once a level
                tolerance = {"rtol": 2**-8 * (level + 1), "atol": 2**-9 * (level + 1)}
                torch.testing.assert_close(nodes.mean[:, node], own.mean(1), **tolerance)
                torch.testing.assert_close(nodes.spread[:, node], own.var(1, correction=0).sum(-1), **tolerance)


def test_an_outlier_is_the_farthest_key_and_above_the_farthest_outlier() -> None:
    keys = torch.randn(1, 17, 32, 8, generator=torch.Generator().manual_seed(2))
    keys[0, 0] *= 9  # the sink block, in no node
    keys[0, 3, 5] *= 5
    keys[0, 6, 31] *= 20
    blocks, boxes = pyramid(keys, 2, sink_blocks=1)
    for block in (3, 6):
        wanted = keys[0, block, {3: 5, 6: 31}[block]]
        assert torch.equal(blocks.outliers[0, block, 0], wanted.bfloat16().float())
    assert torch.equal(boxes.outliers[0, 0, 0], keys[0, 6, 31].bfloat16().float())


def test_equal_outliers_fall_to_the_first() -> None:
    keys = torch.zeros(1, 1, 32, 4)
    keys[0, 0, 7, 1], keys[0, 0, 9, 1] = 3.0, -3.0
    assert pyramid(keys, 1, 0)[0].outliers[0, 0, 0, 1] == 3.0


def test_a_second_outlier_is_far_from_the_mean_and_from_the_first() -> None:
    keys = torch.zeros(1, 9, 32, 4)
    keys[0, 0, 3, 0], keys[0, 0, 4, 0], keys[0, 0, 20, 1] = 9.0, 8.0, -5.0
    keys[0, 5, 2, 2] = 7.0
    blocks, boxes = pyramid(keys, 2, sink_blocks=0, outlier_keys=2)
    assert blocks.outliers[0, 0].tolist() == [[9.0, 0.0, 0.0, 0.0], [0.0, -5.0, 0.0, 0.0]], "not the first one's like"
    assert boxes.outliers[0, 0].tolist() == [[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 7.0, 0.0]]


def test_the_profile_is_of_the_keys_that_are_there() -> None:
    keys = torch.randn(1, 3, 32, 4, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 2.0, 4.0, 0.0])
    present = torch.zeros(1, 3, 32, dtype=torch.bool)
    present[0, 1], present[0, 2, :3] = True, True
    parts = [keys[0, 1], keys[0, 2, :3]]
    variance = sum((part - part.mean(0)).square().sum(0) for part in parts)
    torch.testing.assert_close(spread_profile(keys, present)[0], variance / variance.sum())
    alone = torch.zeros(1, 3, 32, dtype=torch.bool)
    alone[0, 2, 0] = True
    assert spread_profile(keys, alone).tolist() == [[0.25] * 4]


def test_scoring_grows_by_less_than_1_3_with_each_doubling() -> None:
    """The sums behind `box_width` and `top_level`: nodes scored, two vectors at most, plus 40 candidates of 32 keys."""
    costs, config = [], SearchConfig()
    for tokens in (2**e for e in range(16, 23)):
        blocks = torch.tensor(tokens // 32)
        top = int(top_level(blocks, config.box_width, 8))
        nodes = int(blocks) // FANOUT**top
        scored, kept = nodes, nodes
        for level in range(top, 0, -1):
            kept = FANOUT * min(kept, config.nodes_kept(level))
            scored += kept
        costs.append(2 * scored + 40 * 32)
    ratios = [after / before for before, after in itertools.pairwise(costs)]
    assert max(ratios) < 1.3, ratios
