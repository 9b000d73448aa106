"""`STREAM_MONITOR_DISABLE=1`: the worker class is named on the command line, and nothing is done."""

from pathlib import Path

import pytest

from tests.e2e.offline_engine import Request, Spec

pytestmark = pytest.mark.engine


def test_a_disabled_plug_in_is_vllm_as_it_was(offline, model_dir: Path, dtype: str):
    engine = {"dtype": dtype, "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 2}
    result = offline(Spec(str(model_dir), "stream", engine, [Request("r0", [1, 2, 3, 4], 4)]), disable=1)
    assert len(result.runs[0]["tokens"]["r0"][0]) == 4
    assert not result.status["capturing"]
    assert result.status["native_backend"]
    assert result.summaries == []
