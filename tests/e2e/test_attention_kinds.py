"""Every kind of attention that is watched, in a real engine: its captured shares are those of transformers' own code.

Models are tiny and random, everything is float32, every block is kept (strategy `exact`): what differs is a mistake.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.e2e.conftest import OfflineResult, ledger, vllm_before
from tests.e2e.offline_engine import Request, Spec
from tests.e2e.recorder import CapturedRow
from tests.e2e.tiny_models import MODELS, make_model
from tests.e2e.truth import EightBits, attention_rows, block_masses, towards_zero

pytestmark = pytest.mark.engine

WATCHED = [name for name, model in MODELS.items() if model.watched]
ESSENTIAL = ("qwen3", "qwen3_fp8", "gemma2", "gpt_oss")
BLOCK, NEW_TOKENS = 32, 8
PROMPTS = {"a": 640, "b": 701}
TOLERANCE = 0.001
"""Of a share: float16 logarithms lose up to half a percent of it, and float32 sums are taken in another order."""
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 256,  # prompts come in chunks
    "num_gpu_blocks_override": 200,
}


@dataclass(frozen=True)
class Captured:
    """One engine's run over PROMPTS.

    Attributes:
        texts: token ids up to the last row's, by request.
        rows: those from which a token was sampled, by request and position.
        truth: per request, post-softmax attention of the same positions, [rows, layers, heads, keys].
    """

    name: str
    model: Path
    result: OfflineResult
    texts: dict[str, list[int]]
    rows: dict[str, list[CapturedRow]]
    truth: dict[str, NDArray[np.float32]]


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="session")
def captures(request, offline, tmp_path_factory) -> Iterator[dict[str, Future[Captured]]]:
    """Runs by the model's name, of all that a test asks for, each engine started once and two at a time."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = dict.fromkeys(params["captured"] for params in asked if "captured" in params)

    def run(name: str) -> Captured:
        folder = tmp_path_factory.mktemp(name)
        make_model(folder, name)
        return _capture(offline, name, folder)

    pool = ThreadPoolExecutor(2)
    try:
        yield {name: pool.submit(run, name) for name in names if not _unfit(name)}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def captured(request, captures) -> Captured:
    """What the engine with the model that the test names captured."""
    if reason := _unfit(request.param):
        pytest.skip(reason)
    return captures[request.param].result()


def _unfit(name: str) -> str:
    """Why a model cannot be served here; empty where it can."""
    if name == "gpt_oss" and vllm_before("0.31"):
        return "its CPU attention takes learned sinks in bfloat16 alone, and this test computes in float32"
    if MODELS[name].cache_scales and not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        return "vLLM's CPU attention takes a KV cache of 8 bits where there is AVX-512 or AMX alone"
    return ""


def of(*names: str) -> pytest.MarkDecorator:
    """Runs a test with the captures of these models; those that are no kind of their own only at leisure."""
    marks = {name: () if name in ESSENTIAL else (pytest.mark.long,) for name in names}
    return pytest.mark.parametrize("captured", [pytest.param(n, marks=m) for n, m in marks.items()], indirect=True)


def eight_bits_of(name: str) -> EightBits | None:
    return None if MODELS[name].cache_scales is None else EightBits(towards_zero, MODELS[name].scales_of)


def _capture(offline: Callable[..., OfflineResult], name: str, model: Path) -> Captured:
    prompts = {request: random_ids(count, seed) for seed, (request, count) in enumerate(PROMPTS.items())}
    requests = [Request(request, ids, NEW_TOKENS) for request, ids in prompts.items()]
    settings = {"strategy": "exact", "top_k": 32, "layers": "all", "heads": "all", "stride": 1, "max_heads": 64}
    result = offline(Spec(str(model), "stream", ENGINE | MODELS[name].engine, requests), **settings)
    rows: dict[str, list[CapturedRow]] = {request: [] for request in prompts}
    for row in result.rows:
        if row.phase != 1:
            rows[row.request_id].append(row)
    texts = {request: ids + result.runs[0]["tokens"][request][0][:-1] for request, ids in prompts.items()}
    truth = {}
    if layers := result.status.get("layers"):
        truth = {
            request: attention_rows(
                str(model), text, 0, torch.float32, layers, eight_bits_of(name), **MODELS[name].truth
            )[-NEW_TOKENS:]
            for request, text in texts.items()
        }
    return Captured(name, model, result, texts, rows, truth)


def errors(captured: Captured, truth: dict[str, NDArray[np.float32]] | None = None) -> NDArray[np.float64]:
    """Largest difference between a block's captured and true share, of each row, layer and head."""
    found = []
    for name, rows in captured.rows.items():
        assert [row.position for row in rows] == [PROMPTS[name] - 1 + n for n in range(NEW_TOKENS)]
        masses = block_masses((truth or captured.truth)[name], BLOCK)
        for row, mass in zip(rows, masses, strict=True):
            found.append(np.abs(row.distribution() - mass[..., : row.position // BLOCK + 1]).max(-1))
    return np.asarray(found)


@of(*WATCHED)
def test_captured_shares_are_those_of_eager_attention(captured):
    status = captured.result.status
    assert (status["layers"], status["refused"]) == (MODELS[captured.name].watched, MODELS[captured.name].refused)
    values = errors(captured)
    print(f"{captured.name}: largest difference of a share {values.max():.5f}, {values.size} rows x layers x heads")
    # A number on the edge between two of 8 bits goes to either, and that may be seen in the layers above.
    certain = values if MODELS[captured.name].cache_scales is None else values[:, 0]
    assert certain.max() < TOLERANCE
    assert np.median(values, (0, 2)).max() < TOLERANCE
    counts = ledger(captured.result.summaries)
    assert counts["captured"] == counts["expected"] == values.size


@of("gemma2")
def test_the_same_check_fails_without_the_soft_cap(captured):
    uncapped = {
        name: attention_rows(str(captured.model), text, 0, torch.float32, [1, 3], attn_logit_softcapping=None)
        for name, text in captured.texts.items()
    }
    assert np.median(errors(captured, {name: rows[-NEW_TOKENS:] for name, rows in uncapped.items()})) > 10 * TOLERANCE


@of("qwen3_fp8")
def test_the_same_check_fails_where_keys_are_not_rounded(captured):
    exact = {
        name: attention_rows(str(captured.model), text, 0, torch.float32)[-NEW_TOKENS:]
        for name, text in captured.texts.items()
    }
    assert np.median(errors(captured, exact)) > 10 * TOLERANCE


@of("gpt_oss")
def test_the_same_check_fails_without_the_learned_sinks(captured):
    alone = {name: rows / rows.sum(-1, keepdims=True) for name, rows in captured.truth.items()}
    assert np.median(errors(captured, alone)) > 10 * TOLERANCE


@of("gpt_oss")
def test_a_learned_sink_has_its_share_and_keys_have_the_rest(captured):
    for name, rows in captured.rows.items():
        for row, true in zip(rows, captured.truth[name], strict=True):
            np.testing.assert_allclose(row.sink_share, 1 - true.sum(-1), atol=3 * TOLERANCE)
            np.testing.assert_allclose(row.distribution().sum(-1) + row.sink_share, 1, atol=0.005)


@pytest.mark.parametrize("mutant", ["heads", "position"])
@of(*WATCHED)
def test_a_wrong_capture_fails_the_same_check(captured, mutant):
    axis = {"position": 0, "heads": 2}[mutant]
    wrong = {request: np.roll(rows, 1, axis) for request, rows in captured.truth.items()}
    assert np.median(errors(captured, wrong)) > 10 * TOLERANCE


@of(*(name for name in MODELS if name not in WATCHED))
def test_a_model_without_a_layer_to_watch_is_served_all_the_same(captured):
    assert not captured.result.status["capturing"]
    assert captured.result.rows == []
    assert all(len(samples[0]) == NEW_TOKENS for samples in captured.result.runs[0]["tokens"].values())
