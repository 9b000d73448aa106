"""The compiled beam over a prompt against the one in plain torch."""

import math
from dataclasses import replace

import pytest
import torch

from stream_kernels.cpu_prompt import CompiledBeam
from stream_kernels.prefill import PrefillSummary, Reduction, search_prefill, search_prompt
from stream_kernels.prompt import read_prompt
from stream_kernels.search import SearchConfig

HEADS, KV_HEADS, DIM = 6, 2, 16
SCALE = 0.25
BEAM = SearchConfig(strategy="beam", block_size=8, top_k=4, box_width=24)
CONFIGS = {
    "three levels": replace(BEAM, box_width=3, upper_width=2),
    "flat": replace(BEAM, box_width=256),
    "reads all it may": replace(BEAM, min_gain=0.0, width=8),
    "two outliers a node": replace(BEAM, outlier_keys=2),
    "the uncertain first": replace(BEAM, spread_weight=3.0),
    "two sinks, no outliers": replace(BEAM, sink_blocks=2, outlier_share=0.0),
    "each head alone": replace(BEAM, share_kv_group=False),
    "no re-rank": replace(BEAM, rerank=False),
}


def drawn(tokens: int, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of a prompt whose blocks differ from each other, as real ones do."""
    rng = torch.Generator().manual_seed(1)
    walk = torch.randn(tokens // 8 + 1, KV_HEADS, dim, generator=rng).repeat_interleave(8, 0)[:tokens]
    keys = walk + 0.5 * torch.randn(tokens, KV_HEADS, dim, generator=rng)
    return 2 * torch.randn(tokens, HEADS, dim, generator=rng), keys


def search(
    queries: torch.Tensor, keys: torch.Tensor, config: SearchConfig, softcap: float, reduction: Reduction, rows: int
) -> PrefillSummary:
    first = len(keys) - len(queries)
    return search_prefill(
        queries, keys, config, scale=SCALE, softcap=softcap, first_query=first, query_block=rows, reduction=reduction
    )


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_finds_what_plain_torch_finds(name: str, softcap: float, reduction: Reduction) -> None:
    """In float32 against float64: a decision on the brink may fall the other way now and then, a mass may not."""
    queries, keys = drawn(2997)
    some = queries[-117:]  # the last query block is short
    assert CompiledBeam.takes(read_prompt(keys, HEADS, CONFIGS[name]))
    found = search(some, keys, CONFIGS[name], softcap, reduction, 20)
    expected = search(some.double(), keys.double(), CONFIGS[name], softcap, reduction, 20)
    torch.testing.assert_close(found.forced_lse, expected.forced_lse, atol=1e-3, rtol=0.0)
    same = (found.block_ids == expected.block_ids).all(-1)
    assert same.float().mean() > 0.95
    for field in ("block_lse", "unobserved_lse", "total_lse", "row_lse"):
        ours, theirs = getattr(found, field)[same], getattr(expected, field)[same]
        assert (ours.isinf() == theirs.isinf()).all()
        finite = ~theirs.isinf()
        error = (ours - theirs)[finite].abs()
        assert error.quantile(0.98) < 1e-3 if field == "unobserved_lse" else error.max() < 0.02
    assert (found.keys_read - expected.keys_read).abs().median() <= 1e-3


def test_head_sizes_that_no_vector_divides() -> None:
    queries, keys = drawn(1200, 12)
    found = search(queries[-40:], keys, BEAM, 0.0, "max", 40)
    expected = search(queries[-40:].double(), keys.double(), BEAM, 0.0, "max", 40)
    assert (found.block_ids == expected.block_ids).all()


def test_parts_over_one_prompt_give_what_the_whole_gives() -> None:
    """Also where an earlier part is searched after a later one, which must leave nothing behind."""
    queries, keys = drawn(2000)
    prompt = read_prompt(keys, HEADS, BEAM)
    whole = search_prompt(queries, prompt, scale=SCALE)
    late = search_prompt(queries[1600:], prompt, scale=SCALE, first_query=1600)
    early = search_prompt(queries[:1600], prompt, scale=SCALE)
    for name, value in vars(whole).items():
        joined = torch.cat([getattr(early, name), getattr(late, name)])
        assert torch.equal(joined, value), name
    assert (whole.block_lse > -math.inf).any()
