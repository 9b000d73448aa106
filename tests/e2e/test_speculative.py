"""Speculative decoding: rows of accepted drafts are captured at their places, rows of rejected ones never."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.e2e.conftest import OfflineResult, ledger, together, vllm_is
from tests.e2e.offline_engine import Request, Spec
from tests.e2e.truth import attention_rows, block_masses

pytestmark = pytest.mark.engine

DRAFTS, BLOCK, LAYERS, HEADS = 4, 32, (0, 15, 29), 9
ENTRY = "The cat sat on the mat. Then the dog sat on the rug. Then the bird sat on the roof. "
NEW_TOKENS = {"a": 40, "b": 33}


@pytest.fixture(scope="session")
def prompts(model_dir: Path) -> dict[str, list[int]]:
    """Texts in which guessing the next tokens from earlier ones is often right, and not always."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return {"a": tokenizer(ENTRY * 12)["input_ids"], "b": tokenizer("Once more. " + ENTRY * 3)["input_ids"]}


@pytest.fixture(scope="session")
def arms(offline: Callable[..., OfflineResult], model_dir: Path, prompts: dict[str, list[int]]):
    """Engines that guess by n-grams: plain, and with every block of some layers captured, of every row."""
    if vllm_is("0.30"):
        pytest.skip("its plain engine fails on a CPU when it judges drafts (warmup/jit_warmup_triton_helper.py:238)")
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": DRAFTS,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
        "async_scheduling": False,
    }
    requests = [Request(name, ids, NEW_TOKENS[name]) for name, ids in prompts.items()]

    def arm(worker: str, **settings: object) -> OfflineResult:
        return offline(Spec(str(model_dir), worker, engine, requests, hash_attention=True), **settings)

    watched = {"strategy": "exact", "top_k": 32, "layers": ",".join(map(str, LAYERS)), "heads": "all"}
    plain, stream = together(lambda: arm("plain"), lambda: arm("stream", stride=1, **watched))
    return {"plain": plain, "stream": stream}


def test_drafts_were_accepted_and_rejected(arms):
    run = arms["plain"].runs[0]
    decoded = [step for step in run["schedule"] if all(tokens <= 1 + DRAFTS for tokens in step.values())]
    rows, sampled = sum(sum(step.values()) for step in decoded), sum(NEW_TOKENS.values())
    assert len(decoded) < max(NEW_TOKENS.values()) - 10, "hardly any draft was accepted"
    assert rows > sampled + 10, "hardly any draft was rejected"


def test_schedule_tokens_and_attention_are_those_of_the_plain_engine(arms):
    assert arms["stream"].status["capturing"], arms["stream"].status
    assert arms["stream"].runs == arms["plain"].runs


def test_rows_are_the_positions_of_the_output(arms, prompts):
    rows = [row for row in arms["stream"].rows if row.phase != 1]
    for name, prompt in prompts.items():
        end = len(prompt) + NEW_TOKENS[name] - 1
        positions = [row.position for row in rows if row.request_id == name]
        # Drafts that were accepted past the last token wanted are the receiver's to discard.
        assert [p for p in positions if p < end] == list(range(len(prompt) - 1, end))
        assert all(p < end + DRAFTS for p in positions)
    counts = ledger(arms["stream"].summaries)
    assert counts["expected"] == sum(count for outcome, count in counts.items() if outcome != "expected")
    # As many rows as tokens, and per request up to DRAFTS that came past the end of the output.
    tokens, unit = sum(NEW_TOKENS.values()), len(LAYERS) * HEADS
    assert tokens <= counts["expected"] / unit <= tokens + 2 * DRAFTS
    assert counts["captured"] == len(rows) * unit


def differences(model_dir: Path, arms: dict[str, OfflineResult], prompts: dict[str, list[int]], shift: int):
    """Total variation of each row against transformers' row `shift` positions on: {request: [rows, L, H]}."""
    found = {}
    for name, prompt in prompts.items():
        texts = prompt + arms["stream"].runs[0]["tokens"][name][0]
        first = len(prompt) - 1
        attention = attention_rows(str(model_dir), texts[:-1], first, torch.float32, list(LAYERS))
        truth = block_masses(attention, BLOCK)
        rows = [row for row in arms["stream"].rows if row.request_id == name and row.phase != 1]
        found[name] = np.asarray(
            [
                0.5 * np.abs(row.distribution() - truth[place][..., : row.position // BLOCK + 1]).sum(-1)
                for row in rows
                if 0 <= (place := row.position - first + shift) < len(truth)
            ]
        )
    return found


def test_rows_of_drafts_equal_recomputed_attention(arms, prompts, model_dir):
    right, wrong = (differences(model_dir, arms, prompts, shift) for shift in (0, 1))
    for name in prompts:
        assert len(right[name]) == NEW_TOKENS[name]
        assert right[name].max() < 0.02, name
        assert np.median(wrong[name]) > 2 * right[name].max(), "a row off by one would not have been noticed"
