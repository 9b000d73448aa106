"""What is captured is what the model attends to: compared with attention recomputed by transformers."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.e2e.conftest import OfflineResult
from tests.e2e.offline_engine import Request, Spec
from tests.e2e.recorder import CapturedRow
from tests.e2e.truth import attention_rows, block_masses, prose

pytestmark = pytest.mark.engine

BLOCK = 32
MEDIAN_BOUND, P99_BOUND = 0.02, 0.05
NEW_TOKENS = 12


def capture(
    offline: Callable[..., OfflineResult], model: Path, dtype: str, context: int, company: bool, **settings: object
):
    """Decode some tokens after a long text; returns the captured rows and each request's full token ids."""
    prompts = {"long": prose(str(model), context)}
    if company:
        prompts["other"] = prose(str(model), context + 40)[40:]
    engine = {"dtype": dtype, "enforce_eager": True, "max_model_len": 8192, "max_num_seqs": 4}
    result = offline(
        Spec(str(model), "stream", engine, [Request(i, ids, NEW_TOKENS) for i, ids in prompts.items()]),
        stride=1,
        **settings,
    )
    rows = [row for row in result.rows if row.phase != 1]
    texts = {i: prompts[i] + result.runs[0]["tokens"][i][0] for i in prompts}
    return rows, texts


def true_masses(model: Path, token_ids: list[int], layers: tuple[int, ...]) -> NDArray[np.float64]:
    """Block masses of the rows that sampled a token: [rows, layers, heads, blocks]."""
    first = len(token_ids) - NEW_TOKENS - 1
    return block_masses(attention_rows(str(model), token_ids[:-1], first, torch.float32, list(layers)), BLOCK)


@pytest.fixture(scope="session")
def exact_capture(offline, model_dir, dtype):
    """Every block of every row, by the exact strategy, over 4,000 tokens, beside a second request."""
    return capture(
        offline, model_dir, dtype, 4000, True, strategy="exact", top_k=160, layers="0,9,15,21,29", heads="all"
    )


@pytest.fixture(scope="session")
def exact_truth(exact_capture, model_dir):
    """The same rows of the first request by transformers."""
    rows, texts = exact_capture
    return true_masses(model_dir, texts["long"], rows[0].layers)


def variation(rows: list[CapturedRow], truth: NDArray[np.float64], first: int) -> NDArray[np.float64]:
    """Total variation of each (row, layer, head), sink block left out of both: [rows, layers, heads]."""
    values = []
    for row in rows:
        blocks = row.position // BLOCK + 1
        p, q = row.distribution(), truth[row.position - first][..., :blocks]
        values.append(0.5 * np.abs(p - q)[..., 1:].sum(-1))
    return np.asarray(values)


def passes(values: NDArray[np.float64]) -> bool:
    """The issue's bound; NaN fails it."""
    return bool(np.median(values) <= MEDIAN_BOUND and np.quantile(values, 0.99) <= P99_BOUND)


def rows_of_long(capture) -> tuple[list[CapturedRow], int]:
    rows, texts = capture
    first = len(texts["long"]) - NEW_TOKENS - 1
    mine = [row for row in rows if row.request_id == "long"]
    assert [row.position for row in mine] == list(range(first, first + NEW_TOKENS))
    return mine, first


def test_exact_rows_hold_the_whole_attention(exact_capture):
    rows, _ = rows_of_long(exact_capture)
    observed = np.asarray([row.distribution().sum(-1) for row in rows])
    np.testing.assert_allclose(observed, 1, atol=0.005)
    assert all((row.unobserved_share == 0).all() for row in rows)


def test_captured_rows_equal_recomputed_attention(exact_capture, exact_truth):
    rows, first = rows_of_long(exact_capture)
    assert first + 1 >= 4000
    values = variation(rows, exact_truth, first)
    figures = {"median": float(np.median(values)), "p99": float(np.quantile(values, 0.99)), "max": float(values.max())}
    print(f"total variation against transformers over {values.size} (row, layer, head): {figures}")
    assert passes(values), figures


def mutants(capture) -> dict[str, list[CapturedRow]]:
    """Five ways in which a capture could be wrong and look right."""
    rows, _ = rows_of_long(capture)
    other = {row.position: row for row in capture[0] if row.request_id == "other"}
    swapped = [
        replace(other[row.position], request_id="long") if row.position in other else replace(row) for row in rows
    ]
    heads = [
        replace(
            row,
            block_ids=np.roll(row.block_ids, 1, 1),
            block_share=np.roll(row.block_share, 1, 1),
            forced_share=np.roll(row.forced_share, 1, 1),
        )
        for row in rows
    ]
    # One decode step apart: what the neighbouring position read, under this position's name.
    shifted = [replace(rows[max(n - 1, 0)], position=row.position) for n, row in enumerate(rows[1:], 1)]
    zeros = [replace(row, block_share=row.block_share * 0, forced_share=row.forced_share * 0) for row in rows]
    uniform = [uniform_row(row) for row in rows]
    return {"requests": swapped, "heads": heads, "position": shifted, "zeros": zeros, "uniform": uniform}


def uniform_row(row: CapturedRow) -> CapturedRow:
    """Equal mass on every block, kept or forced."""
    blocks = row.position // BLOCK + 1
    share = np.where(np.isfinite(row.block_share) & (row.block_ids != 0xFFFFFFFF), 1 / blocks, 0.0)
    return replace(row, block_share=share, forced_share=np.full_like(row.forced_share, 1 / blocks))


@pytest.mark.parametrize("mutant", ["requests", "heads", "position", "zeros", "uniform"])
def test_a_wrong_capture_fails_the_same_check(mutant, exact_capture, exact_truth):
    _, first = rows_of_long(exact_capture)
    values = variation(mutants(exact_capture)[mutant], exact_truth, first)
    assert not passes(values), f"median {np.median(values):.4f}, p99 {np.quantile(values, 0.99):.4f}"


def test_rows_of_a_prompt_equal_recomputed_attention(offline, model_dir, dtype):
    prompts = {"long": prose(str(model_dir), 700), "other": prose(str(model_dir), 1000)[600:]}
    engine = {"dtype": dtype, "enforce_eager": True, "max_model_len": 8192, "max_num_seqs": 4}
    spec = Spec(
        str(model_dir),
        "stream",
        engine | {"max_num_batched_tokens": 256},
        [Request(i, ids, 2) for i, ids in prompts.items()],
    )
    result = offline(spec, strategy="exact", top_k=32, layers="0,9,29", heads="all", prompt_stride=32, stride=1)
    of_prompt = {i: [row for row in result.rows if row.request_id == i and row.phase == 1] for i in prompts}
    ends = [row.position for row in of_prompt["long"]]
    assert ends == sorted(set(ends))
    assert len(ends) >= 700 // 32 - 1
    # Chunks are of 256 tokens in all, so that the other's are in some of them.
    assert all(late - early <= 32 for late, early in zip(ends[1:], ends, strict=False)), ends
    for name, rows in of_prompt.items():
        truth = block_masses(attention_rows(str(model_dir), prompts[name], 0, torch.float32, [0, 9, 29]), BLOCK)
        values = variation(rows, truth, 0)
        assert passes(values), f"median {np.median(values):.4f}, p99 {np.quantile(values, 0.99):.4f}"
        shifted = [replace(row, position=row.position + 1) for row in rows if row.position % BLOCK < BLOCK - 1]
        assert not passes(variation(shifted, truth, 0)), "the next position's attention is another"


@pytest.fixture(scope="session")
def default_capture(offline, model_dir, dtype):
    """The default strategy and table over 7,000 tokens, every layer and head."""
    return capture(offline, model_dir, dtype, 7040, False, layers="0,9,15,21,29", heads="all")


@pytest.fixture(scope="session")
def default_truth(default_capture, model_dir):
    """The same rows by transformers."""
    rows, texts = default_capture
    return true_masses(model_dir, texts["long"], rows[0].layers)


def test_default_rows_are_whole_and_of_the_default_table(default_capture):
    rows, first = rows_of_long(default_capture)
    assert first + 1 >= 7000
    for row in rows:
        assert (row.geometry.strategy, row.geometry.top_k, row.geometry.block_size) == ("beam", 8, BLOCK)
        total = row.block_share.sum(-1) + row.forced_share.sum(-1) + row.unobserved_share
        np.testing.assert_allclose(total, 1, atol=0.01)


def test_the_default_search_keeps_nine_tenths_of_what_exact_keeps(default_capture, default_truth):
    rows, first = rows_of_long(default_capture)
    kept, best, reads = [], [], []
    for row in rows:
        blocks = row.position // BLOCK + 1
        inner = default_truth[row.position - first][..., :blocks].copy()
        inner[..., [block for block in row.forced_ids() if block >= 0]] = 0
        total = inner.sum(-1)
        assert (row.block_ids < blocks).all()
        kept.append(np.take_along_axis(inner, row.block_ids, -1).sum(-1) / total)
        best.append(np.sort(inner, -1)[..., -8:].sum(-1) / total)
        reads.append(row.keys_read / (row.position + 1))
    ratio = float(np.mean(kept) / np.mean(best))
    print(
        f"inner recall {np.mean(kept):.3f}, exact's {np.mean(best):.3f}, ratio {ratio:.3f}, "
        f"keys read {np.mean(reads):.1%}"
    )
    assert math.isfinite(ratio)
    assert ratio >= 0.9
