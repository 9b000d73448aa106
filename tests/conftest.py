"""Fixtures for the whole suite."""

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Without an NVIDIA driver, Triton kernels are interpreted. Triton settles that for its own library as it is imported,
# so that must be here, before any test imports vLLM; engines that tests start shall not inherit it.
if not any(Path(trace).exists() for trace in ("/proc/driver/nvidia", "/dev/nvidiactl")):
    with suppress(ImportError):
        os.environ["TRITON_INTERPRET"] = "1"
        import triton

        triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]

# Monitors that tests start leave nothing behind, and do not find what a user's own monitor keeps.
os.environ["STREAM_MONITOR_STORE"] = ""

# A suite that a script starts in its background inherits SIGINT as ignored, and so would every process it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def compiled_loops() -> None:
    """The monitor's machine code, in this process and on disk: compiling it takes longer than a test may."""
    from stream_monitor import compiled

    compiled.prepare()


@pytest.fixture(scope="session")
def compiled_search() -> None:
    """The CPU search's machine code, in this process and on disk: compiling it takes longer than a test may."""
    import torch

    from stream_kernels.cpu import CpuSearch
    from stream_kernels.layout import KeyLayout, PagedKeys
    from stream_kernels.search import SearchConfig

    cache = PagedKeys(torch.zeros(1, 1, 32, 128), KeyLayout(32, 64, 32, 1), 1.0)
    CpuSearch([cache], 1, SearchConfig(), max_rows=1, max_context=32, query_dtype=torch.float32)


@pytest.fixture
def closed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be entered: not by root either, whom permissions do not bind, since the calls refuse it."""
    folder = tmp_path / "closed"

    def refusing(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(path, str | Path) and folder in Path(path).parents:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *arguments, **named)

        return called

    folder.mkdir()
    for module, name in ((os, "stat"), (os, "mkdir"), (io, "open")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    return folder


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched if it is not in the cache yet (see `make weights`)."""
    folder = ROOT / os.environ.get("MODEL_CACHE", ".cache/models") / "smollm2"
    # A process of its own, so that a test that counts imports or memory is not disturbed.
    subprocess.run([sys.executable, "-m", "stream_monitor.demo.weights", str(folder)], check=True, cwd=ROOT)
    return folder
