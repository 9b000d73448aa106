"""Attention, whole and restricted, against a square of logits with the same mask."""

from collections.abc import Iterator

import pytest
import torch

from stream_kernels.prefill import PrefillSummary, Reduction, search_prefill
from stream_kernels.search import NO_BLOCK, SearchConfig
from stream_monitor.tracing import attention, layer, sparse_attention
from stream_monitor.tracing.attention import LayerInputs
from stream_monitor.tracing.layer import TraceOptions, search_layer
from stream_monitor.tracing.window_search import search_window
from tests.tracing import tiny

REDUCTIONS: tuple[Reduction, ...] = ("max", "mean", "union")
SEARCH = SearchConfig(strategy="exact", block_size=8, top_k=2, recent_blocks=2)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_TILE_LOGITS", 3000)
    monkeypatch.setattr(sparse_attention, "_TILE_NUMBERS", 20_000)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def read_keys(found: PrefillSummary, given: LayerInputs, size: int) -> torch.Tensor:
    """Keys in a kept or forced block of each row and head, bool [H, Q, T]."""
    queries, heads, _ = given.queries.shape
    read = torch.zeros(heads, queries, len(given.keys), dtype=torch.bool)
    for block in range(len(found.rows)):
        first = int(found.first_position[block]) - given.first_query
        rows = slice(first, first + int(found.rows[block]))
        for head in range(heads):
            for key_block in {*found.block_ids[block, head].tolist(), *found.forced_ids[block].tolist()} - {NO_BLOCK}:
                read[head, rows, key_block * size : (key_block + 1) * size] = True
    return read


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [0, 45])
@pytest.mark.parametrize("queries", [203, 1, 43])
@pytest.mark.parametrize("value_dim", [8, 16])
def test_dense_attention_is_that_of_a_square(softcap: float, window: int, queries: int, value_dim: int) -> None:
    given = tiny.inputs(203, queries, softcap=softcap, window=window, value_dim=value_dim)
    torch.testing.assert_close(attention.dense_attention(given), tiny.output(given))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (2.0, 0), (0.0, 45), (2.0, 40)])
@pytest.mark.parametrize("queries", [203, 200, 1, 43])
def test_sparse_attention_is_dense_attention_with_the_same_mask(
    reduction: Reduction, softcap: float, window: int, queries: int
) -> None:
    given = tiny.inputs(203, queries, softcap=softcap, window=window)
    found = search_layer(given, TraceOptions(SEARCH, reduction=reduction))
    read = read_keys(found, given, SEARCH.block_size)
    assert not (read | ~torch.isfinite(tiny.logits(given))).all(), "nothing was pruned"
    torch.testing.assert_close(sparse_attention.sparse_attention(given, found, 8), tiny.output(given, read))


@pytest.mark.parametrize("strategy", ["beam", "exact", "descent"])
@pytest.mark.parametrize("window", [0, 45])
def test_chunks_find_what_the_whole_prompt_does(strategy: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "_MOST_BLOCKS", 3)
    given = tiny.inputs(203, window=window)
    search = SearchConfig(strategy=strategy, block_size=8, top_k=2, width=3)  # type: ignore[arg-type]
    if window:
        whole = search_window(given, search, 8, "max")
    else:
        whole = search_prefill(given.queries, given.keys, search, scale=given.scale, query_block=8)
    for name, value in vars(search_layer(given, TraceOptions(search))).items():
        torch.testing.assert_close(value, vars(whole)[name])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("queries", [203, 1])
def test_a_window_as_long_as_the_prompt_is_searched_like_no_window(
    reduction: Reduction, softcap: float, queries: int
) -> None:
    given = tiny.inputs(203, queries, softcap=softcap, window=203)
    found = search_window(given, SEARCH, 8, reduction)
    expected = search_prefill(
        given.queries,
        given.keys,
        SEARCH,
        scale=given.scale,
        softcap=softcap,
        first_query=given.first_query,
        query_block=8,
        reduction=reduction,
    )
    for name in ("first_position", "rows", "block_ids", "forced_ids"):
        assert torch.equal(vars(found)[name], vars(expected)[name]), name
    for name in ("block_lse", "forced_lse", "unobserved_lse", "total_lse", "row_lse"):
        torch.testing.assert_close(vars(found)[name], vars(expected)[name], atol=1e-5, rtol=1e-5)


def test_nothing_outside_a_window_is_kept_and_the_rest_is_accounted_for() -> None:
    given = tiny.inputs(203, window=45)
    found = search_window(given, SEARCH, 8, "mean")
    inside = torch.isfinite(tiny.logits(given))[0]
    for block, first in enumerate(found.first_position.tolist()):
        rows = inside[first : first + int(found.rows[block])].any(0)
        seen = set((rows.nonzero() // 8).flatten().tolist())
        kept = {*found.block_ids[block].flatten().tolist(), *found.forced_ids[block].tolist()} - {NO_BLOCK}
        assert kept <= seen
    mass = torch.cat([found.block_lse, found.forced_lse.expand(-1, 6, -1), found.unobserved_lse[..., None]], -1)
    torch.testing.assert_close(mass.logsumexp(-1), found.total_lse, atol=1e-5, rtol=1e-5)
