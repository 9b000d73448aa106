"""Fixtures: tiny models, for everything that needs no real one."""

from pathlib import Path

import pytest

from stream_monitor.tracing.model import TracedModel, load
from tests.tracing import tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers."""
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> TracedModel:
    return load(str(tiny_folder))


@pytest.fixture(scope="session")
def windowed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 2 of three layers, the last two of which see a window of 70 tokens."""
    window = {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}
    return tiny.save(tmp_path_factory.mktemp("windowed"), "qwen2", **window)


@pytest.fixture(scope="session")
def windowed_model(windowed_folder: Path) -> TracedModel:
    return load(str(windowed_folder))
