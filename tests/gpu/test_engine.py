"""The GPU side in a real engine: model runner V2, its scheduler and the paged cache of vLLM's CUDA build.

On a GPU with CUDA graphs, TRITON_ATTN and FLASH_ATTN; without one on a CPU with every kernel interpreted, where there
are neither streams nor graphs. Skipped where that build is not installed (docs/design.md says how). What is held to the
truth is whose row is whose, where its keys are, and what the search makes of them.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.e2e.conftest import OfflineResult, ledger
from tests.e2e.offline_engine import Request, Spec
from tests.e2e.recorder import Recorder
from tests.e2e.tiny_models import make_model
from tests.e2e.truth import EightBits, attention_rows, block_masses, nearest

ROOT = Path(__file__).resolve().parents[2]
MINOR = "0.26"
"""Of the release that the pretence was written for."""
ON_GPU = torch.cuda.is_available()
BLOCK, NEW_TOKENS = 32, 60 if ON_GPU else 5
PROMPTS = {"a": 100, "b": 230}
LAYERS, HEADS = 4, 4


def installed() -> bool:
    """Whether vLLM's CUDA build is here: of any release with a GPU, else of the one that can be interpreted."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return ON_GPU or version.startswith(f"{MINOR}.")


pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not installed(), reason=f"needs vLLM built for CUDA, {MINOR} on a machine without a GPU"),
    pytest.mark.timeout(900),
]


@dataclass(frozen=True)
class Kind:
    """An engine that is tried."""

    asynchronous: bool
    backend: str = "TRITON_ATTN"
    cache: str = "auto"

    def __str__(self) -> str:
        return f"{self.backend}, {'a' * self.asynchronous}synchronous, KV cache {self.cache}"

    @property
    def eight_bits(self) -> EightBits | None:
        """How its cache rounds. These backends have the queries rounded, too."""
        return EightBits(nearest, queries=True) if self.cache == "fp8" else None


KINDS = [Kind(False), Kind(True), Kind(False, cache="fp8")]
if ON_GPU:
    KINDS += [Kind(True, "FLASH_ATTN"), Kind(True, "FLASH_ATTN", "fp8")]


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    make_model(folder, "qwen3")
    return folder


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[..., OfflineResult]:
    """Run PROMPTS in an engine of their own; keyword arguments are settings of the plug-in."""

    def run(
        worker: str, kind: Kind, blocks: int = 64, new_tokens: int = NEW_TOKENS, **settings: object
    ) -> OfflineResult:
        folder = tmp_path_factory.mktemp("engine")
        target = f"unix:{folder / 'ingest.sock'}"
        arguments = {
            "dtype": "float16",
            "enforce_eager": not ON_GPU,
            "max_model_len": 320,  # what 22 blocks hold, and a little less
            "max_num_seqs": 4,
            "max_num_batched_tokens": 128,  # prompts come in chunks
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": 1 << 30,  # else vLLM looks at what other processes take of the GPU
            "num_gpu_blocks_override": blocks,
            "attention_config": {"backend": kind.backend},
            "async_scheduling": kind.asynchronous,
            "kv_cache_dtype": kind.cache,
        }
        requests = [Request(name, random_ids(length, length), new_tokens) for name, length in PROMPTS.items()]
        (folder / "spec.json").write_text(json.dumps(asdict(Spec(str(model), worker, arguments, requests))))
        environment = os.environ | {
            "STREAM_MONITOR_TARGET": target,
            "STREAM_MONITOR_ALLOW_UNTESTED_ENGINE": "1",
            "STREAM_MONITOR_MAX_OVERHEAD": "0",
            "STREAM_MONITOR_QUEUE_STEPS": "64",  # an interpreted search is slower than an interpreted step
            "STREAM_MONITOR_STRIDE": "1",
            **{f"STREAM_MONITOR_{key.upper()}": str(value) for key, value in settings.items()},
        }
        module = "tests.e2e.offline_engine" if ON_GPU else "tests.gpu.interpreted_engine"
        files = str(folder / "spec.json"), str(folder / "result.json")
        recorder = Recorder(target)
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, *files],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
        finally:
            recorder.stop()
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        result = json.loads((folder / "result.json").read_text())
        return OfflineResult(result["runs"], result["statuses"], recorder.summaries)

    return run


@pytest.fixture(scope="session")
def plain(engine) -> Callable[[Kind], OfflineResult]:
    """Without the plug-in."""
    return cache(lambda kind: engine("plain", kind))


@pytest.fixture(scope="session", params=KINDS, ids=str)
def exact(request, engine) -> tuple[Kind, OfflineResult]:
    """Every block of every row in every layer and head, and of each prompt one row in 16."""
    everything = {"strategy": "exact", "layers": "all", "heads": "all", "top_k": 16, "prompt_stride": 16}
    return request.param, engine("stream", request.param, **everything)


def texts(result: OfflineResult) -> dict[str, list[int]]:
    return {name: random_ids(length, length) + result.runs[0]["tokens"][name][0] for name, length in PROMPTS.items()}


def check_shares(result: OfflineResult, model: Path, kind: Kind) -> None:
    """Every captured row against what transformers attends to from its position, and from the one before it."""
    # Of 8 bits the kernels round more than keys, values and queries: what later layers are given is theirs alone.
    layers = slice(0, None if kind.eight_bits is None else 1)
    worst = noise = shifted = 0.0
    for name, ids in texts(result).items():
        truth, half = (
            block_masses(attention_rows(str(model), ids, 0, dtype, eight_bits=kind.eight_bits)[:, layers], BLOCK)
            for dtype in (torch.float32, torch.float16)
        )
        noise = max(noise, float(np.abs(half - truth).max()))
        for row in (row for row in result.rows if row.request_id == name):
            found, blocks = row.distribution()[layers], row.position // BLOCK + 1
            worst = max(worst, float(np.abs(found - truth[row.position][..., :blocks]).max()))
            shifted = max(shifted, float(np.abs(found - truth[row.position - 1][..., :blocks]).max()))
    print(f"largest difference from transformers: {worst:.4f}; of its float16: {noise:.4f}; one row off: {shifted:.4f}")
    assert worst <= noise < shifted / 4


def test_answers_and_schedules_are_those_of_the_plain_engine(plain, exact):
    kind, result = exact
    assert result.status["capturing"], result.status
    assert result.runs[0]["schedule"] == plain(kind).runs[0]["schedule"]
    assert result.runs[0]["tokens"] == plain(kind).runs[0]["tokens"]


def test_every_row_is_there_once_under_its_own_name(exact):
    _, result = exact
    for name, length in PROMPTS.items():
        rows = [row for row in result.rows if row.request_id == name]
        assert [row.position for row in rows if row.phase != 1] == list(range(length - 1, length + NEW_TOKENS - 1))
        assert {row.layers for row in rows} == {tuple(range(LAYERS))}
        ends = [-1, *(row.position for row in rows if row.phase != 3)]
        assert all(0 < late - early <= 16 for early, late in pairwise(ends)), ends
    assert [row for row in result.rows if row.phase == 1], "no prompt came in chunks"
    for kind in ("token_rows", "chunk_rows"):
        counts = ledger(result.summaries, kind)
        assert counts["captured"] == counts["expected"] > 0
        assert counts["captured"] == len([r for r in result.rows if (r.phase == 1) == (kind == "chunk_rows")]) * 16


def test_captured_shares_are_the_models_attention(exact, model):
    """The engine computes in float16: its shares are no further from float32 than those of transformers in float16."""
    kind, result = exact
    check_shares(result, model, kind)


def test_tokens_arrive_with_their_positions(exact):
    _, result = exact
    for name, length in PROMPTS.items():
        runs = [run for summary in result.summaries for run in summary.tokens if run.request_id == name]
        places = [run.first_position + n for run in runs for n in range(len(run.flags))]
        assert places == list(range(length, length + NEW_TOKENS))


def test_a_beam_over_summaries_on_the_device_finds_what_exact_search_finds(engine, exact):
    kind, truth = exact
    narrow = {"strategy": "beam", "layers": "all", "heads": "all", "top_k": 2, "block_size": 16, "min_gain": 0}
    result = engine("stream", kind, audit_every=1, **narrow)
    assert result.status["strategy"] == "beam"
    assert result.status["summary_bytes"] > 0
    counts = ledger(result.summaries)
    assert counts["captured"] == counts["expected"]
    audits = [audit.recall for summary in result.summaries for audit in summary.audits]
    print(f"recall of {len(audits)} audits: mean {np.mean(audits):.3f}, least {min(audits):.3f}")
    assert np.mean(audits) > 0.8
    totals = {(row.request_id, row.position): row.total_lse for row in truth.rows}
    for row in result.rows:
        np.testing.assert_allclose(row.total_lse, totals[row.request_id, row.position], atol=0.5)


def was_away(name: str, schedule: list[dict[str, int]]) -> bool:
    """Whether a request had steps, then none, then some again."""
    there = "".join("+" if name in step else " " for step in schedule)
    return " " in there.strip()


def test_preempted_requests_keep_their_rows(engine, model):
    """So few blocks that one request, as it grows, has to make room for the other, which gets its blocks."""
    new_tokens = max(NEW_TOKENS, 16)
    everything = {"strategy": "exact", "layers": "all", "heads": "all", "top_k": 16}
    result = engine("stream", Kind(False), blocks=23, new_tokens=new_tokens, **everything)
    assert result.status["capturing"], result.status
    assert any(was_away(name, result.runs[0]["schedule"]) for name in PROMPTS), "nobody made room"
    check_shares(result, model, Kind(False))
    counts = ledger(result.summaries)
    assert counts["expected"] == sum(count for outcome, count in counts.items() if outcome != "expected")
    for name, length in PROMPTS.items():
        positions = {row.position for row in result.rows if row.request_id == name and row.phase != 1}
        assert positions <= set(range(length - 1, length + new_tokens - 1))
