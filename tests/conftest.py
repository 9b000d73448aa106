"""Fixtures for the whole suite."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A suite that a script starts in its background inherits SIGINT as ignored, and so would every process it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched if it is not in the cache yet (see `make weights`)."""
    folder = ROOT / os.environ.get("MODEL_CACHE", ".cache/models") / "smollm2"
    # A process of its own, so that a test that counts imports or memory is not disturbed.
    subprocess.run([sys.executable, "-m", "stream_monitor.demo.weights", str(folder)], check=True, cwd=ROOT)
    return folder
