"""Prefill mode does for a block of queries what the reference does for one, and never holds a square of the prompt."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stream_kernels.prefill import PrefillSummary, Reduction, search_prefill
from stream_kernels.reference import search_dense, search_units
from stream_kernels.search import NO_BLOCK, SearchConfig

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 16, 0.3
EXACT = SearchConfig(strategy="exact", block_size=8, top_k=3)
BEAM = SearchConfig(strategy="beam", block_size=8, top_k=3, width=6, box_width=2, min_gain=0.002)
DESCENT = SearchConfig(strategy="descent", block_size=8, top_k=3, width=3)
CONFIGS = {
    "exact": EXACT,
    "beam": BEAM,
    "beam, per head": replace(BEAM, share_kv_group=False),
    "beam, not re-ranked": replace(BEAM, rerank=False),
    "beam, many sinks": replace(BEAM, sink_blocks=9, recent_blocks=1),
    "beam, no sink": replace(BEAM, sink_blocks=0, recent_blocks=3),
    "descent": DESCENT,
    "descent, not re-ranked": replace(DESCENT, rerank=False),
    "paper": SearchConfig.paper(top_k=3, block_size=8),
}
REDUCTIONS: tuple[Reduction, ...] = ("max", "mean", "union")


def drawn(tokens: int, queries: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(tokens)
    return (
        2 * torch.randn(queries or tokens, HEADS, DIM, generator=rng, dtype=dtype),
        torch.randn(tokens, KV_HEADS, DIM, generator=rng, dtype=dtype),
    )


def log_shares(queries: torch.Tensor, keys: torch.Tensor, first_query: int, softcap: float = 0.0) -> torch.Tensor:
    """Dense causal attention: logarithm of every key's share, [H, Q, T]."""
    logits = SCALE * queries.transpose(0, 1) @ keys.repeat_interleave(HEADS // KV_HEADS, 1).permute(1, 2, 0)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    rows = first_query + torch.arange(len(queries))
    return logits.masked_fill(torch.arange(len(keys)) > rows[:, None], -math.inf).log_softmax(-1)


def shares_of(found: PrefillSummary, mass: torch.Tensor) -> torch.Tensor:
    level = found.total_lse
    return (mass - level.view(*level.shape, *[1] * (mass.ndim - 2))).exp()


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)


def assert_equal(found: PrefillSummary, expected: PrefillSummary) -> None:
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_single_row_is_searched_as_the_reference_does(name: str, softcap: float, reduction: Reduction) -> None:
    config = CONFIGS[name]
    queries, keys = drawn(1301)
    rows = [0, 7, 8, 63, 130, 200, 517, 1023, 1300]
    units = search_units(range(HEADS), HEADS // KV_HEADS, config)
    for row in rows:
        found = search_prefill(
            queries[row : row + 1],
            keys,
            config,
            scale=SCALE,
            softcap=softcap,
            first_query=row,
            query_block=1,
            reduction=reduction,
            union_limit=config.top_k,
        )
        expected = search_dense(
            torch.stack([SCALE * queries[row, slots] for _, slots in units]),
            torch.stack([keys[:, kv_head] for kv_head, _ in units]),
            torch.full((len(units),), row + 1),
            torch.ones(len(units), len(units[0][1]), dtype=torch.bool),
            None,
            softcap,
            config,
        )
        for field in ("block_ids", "block_lse", "forced_lse", "unobserved_lse"):
            value = getattr(expected, field).flatten(0, 1)
            actual = getattr(found, field)[0].to(value.dtype)
            torch.testing.assert_close(
                actual, value, atol=1e-5, rtol=1e-5, msg=lambda m, f=field, r=row: f"{r} {f}: {m}"
            )
        assert found.keys_read[0].item() == pytest.approx(float(expected.keys_read.sum()) / HEADS)


@pytest.mark.parametrize("first_query", [0, 1, 96, 333])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_exact_masses_are_those_of_dense_attention(reduction: Reduction, first_query: int) -> None:
    """Query blocks reach across several key blocks, the last one is short, and the first rows have next to no keys."""
    length, size = 401, EXACT.block_size
    queries, keys = drawn(length)
    found = search_prefill(
        queries[first_query:], keys, EXACT, scale=SCALE, first_query=first_query, reduction=reduction, union_limit=50
    )
    dense = log_shares(queries[first_query:], keys, first_query).exp()
    blocks = torch.nn.functional.pad(dense, (0, -length % size)).unflatten(-1, (-1, size)).sum(-1)
    assert found.first_position.tolist() == list(range(first_query, length, 32))
    assert found.rows.sum() == length - first_query
    for at, (position, rows) in enumerate(zip(found.first_position.tolist(), found.rows.tolist(), strict=True)):
        own = blocks[:, position - first_query : position - first_query + rows]  # [H, n, N]
        reduced = own.mean(1) if reduction == "mean" else own.amax(1)
        end = max(1, position // size + 1 - EXACT.recent_blocks)
        forced = [b for b in found.forced_ids[at].tolist() if b != NO_BLOCK]
        assert forced == sorted({0, *range(end, (position + rows - 1) // size + 1)})
        listed = found.forced_ids[at] != NO_BLOCK
        assert_near(shares_of(found, found.forced_lse)[at][:, listed], reduced[:, forced])
        assert (found.forced_lse[at][:, ~listed] == -math.inf).all()
        for head in range(HEADS):
            inner = reduced[head, 1:end]
            if reduction == "union":
                best = own[head, :, 1:end].topk(min(EXACT.top_k, end - 1), -1).indices.flatten().unique()
            else:
                best = inner.topk(min(EXACT.top_k, end - 1)).indices
            best = 1 + best[inner[best].argsort(descending=True)]
            kept = found.block_ids[at, head]
            assert kept[kept != NO_BLOCK].tolist() == best.tolist()
            assert_near(shares_of(found, found.block_lse)[at, head, : len(best)], reduced[head, best])
            rest = [b for b in range(1, end) if b not in best]
            lost = own[head][:, rest].sum(-1)
            lost = lost.mean() if reduction == "mean" else lost.max()
            assert_near(shares_of(found, found.unobserved_lse)[at, head], lost)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("config", [replace(BEAM, width=64, box_width=256, min_gain=0.0), replace(DESCENT, width=64)])
def test_a_search_wide_enough_finds_what_exact_finds(config: SearchConfig, reduction: Reduction) -> None:
    queries, keys = drawn(777)
    found = search_prefill(queries, keys, config, scale=SCALE, softcap=9.0, reduction=reduction)
    expected = search_prefill(queries, keys, EXACT, scale=SCALE, softcap=9.0, reduction=reduction)
    assert_equal(replace(found, keys_read=expected.keys_read), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_mean_shares_are_all_of_the_attention(name: str) -> None:
    queries, keys = drawn(900)
    found = search_prefill(queries, keys, CONFIGS[name], scale=SCALE, reduction="mean")
    total = sum(
        shares_of(found, mass).flatten(2).sum(-1)
        for mass in (found.block_lse, found.forced_lse, found.unobserved_lse[..., None])
    )
    torch.testing.assert_close(total, torch.ones_like(found.total_lse))


def test_beam_finds_most_of_what_exact_finds_and_reads_less() -> None:
    """Keys drift slowly, as real ones do, so that summaries can say something."""
    rng = torch.Generator().manual_seed(0)
    keys = 0.3 * torch.randn(4096, KV_HEADS, DIM, generator=rng)
    keys += torch.randn(128, KV_HEADS, DIM, generator=rng).repeat_interleave(32, 0)
    queries = 2 * torch.randn(64, HEADS, DIM, generator=rng)
    config = SearchConfig(strategy="beam", block_size=16, top_k=4, width=8)
    arguments: dict[str, Any] = {"scale": SCALE, "first_query": 4096 - 64, "reduction": "mean"}
    found = search_prefill(queries, keys, config, **arguments)
    exact = search_prefill(queries, keys, replace(config, strategy="exact"), **arguments)
    kept, best = (shares_of(s, s.block_lse).sum(-1).mean() for s in (found, exact))
    assert kept > 0.9 * best
    assert (found.keys_read < 0.5 * exact.keys_read).all()


@pytest.mark.parametrize(("name", "others"), [("min_gain", {"width": 64}), ("width", {})])
def test_a_prompt_is_read_further_than_a_decoded_token(name: str, others: dict[str, int]) -> None:
    queries, keys = drawn(1301)
    prompt = SearchConfig.for_prompt(block_size=8, top_k=3, **others)
    decoded = replace(prompt, **{name: getattr(SearchConfig(), name)})
    found, narrower, exact = (
        search_prefill(queries[-64:], keys, config, scale=SCALE, first_query=1301 - 64)
        for config in (prompt, decoded, replace(prompt, strategy="exact"))
    )

    def right(searched: PrefillSummary) -> int:
        return int((searched.block_ids[..., None] == exact.block_ids[..., None, :]).sum())

    assert (found.keys_read > narrower.keys_read).all()
    assert right(narrower) < right(found) <= exact.block_ids.numel()


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_of_a_prompt_give_what_the_whole_gives(name: str) -> None:
    queries, keys = drawn(1000, dtype=torch.float32)
    whole = search_prefill(queries, keys, CONFIGS[name], scale=SCALE)
    parts = []
    for first, end in ((0, 256), (256, 640), (640, 1000)):
        part = search_prefill(queries[first:end], keys[:end], CONFIGS[name], scale=SCALE, first_query=first)
        parts.append(vars(part))
    assert_equal(PrefillSummary(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}), whole)


def test_union_keeps_the_heaviest_up_to_its_limit() -> None:
    queries, keys = drawn(500)
    every = search_prefill(queries, keys, EXACT, scale=SCALE, reduction="union", union_limit=40)
    few = search_prefill(queries, keys, EXACT, scale=SCALE, reduction="union", union_limit=5)
    by_default = search_prefill(queries, keys, EXACT, scale=SCALE, reduction="union")
    assert torch.equal(few.block_ids, every.block_ids[..., :5])
    assert torch.equal(by_default.block_ids, every.block_ids[..., :12])
    assert (every.block_ids[-1] != NO_BLOCK).sum(-1).max() > 5


class _Largest(TorchDispatchMode):
    """Notes the most elements that any tensor made while it is active has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("config", [EXACT, BEAM, DESCENT])
def test_no_tensor_grows_faster_than_the_prompt(config: SearchConfig) -> None:
    """Even where the logits of one query block are formed for every key."""
    largest = {}
    for tokens in (2500, 20000):
        queries, keys = drawn(tokens, 70, torch.float32)
        with _Largest() as seen:
            search_prefill(queries, keys, config, scale=SCALE, first_query=tokens - 70)
        largest[tokens] = seen.elements
    assert largest[20000] <= 32 * HEADS * 20000
    assert largest[20000] <= 8.5 * max(largest[2500], 32 * HEADS * 1024)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    queries, keys = (part.to(dtype) for part in drawn(300))
    found = search_prefill(queries, keys, EXACT, scale=SCALE)
    assert_equal(found, search_prefill(queries.float(), keys.float(), EXACT, scale=SCALE))
    assert found.block_lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.zeros(4, 6)}, r"expected \[Q, H, D\]"),
        ({"queries": torch.zeros(0, 6, 16)}, "Q >= 1"),
        ({"queries": torch.zeros(4, 6, 8)}, r"expected \[Q, H, 16\]"),
        ({"queries": torch.zeros(4, 5, 16)}, "do not divide"),
        ({"first_query": 5}, "do not reach"),
        ({"first_query": -1}, "do not reach"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"query_block": 0}, "query_block is 0"),
        ({"union_limit": 0}, "union_limit 0"),
        ({"reduction": "sum"}, "valid: max, mean, union"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"queries": torch.zeros(4, 6, 16), "keys": torch.zeros(8, 2, 16), "config": EXACT, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        search_prefill(**(arguments | changes))
