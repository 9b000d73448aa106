"""Under torch.compile, vLLM's default, the engine answers as without the plug-in, and the capture sees what it sees
without the compiler."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.offline_engine import Request, Spec
from tests.e2e.truth import prose

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def served(offline, model_dir: Path):
    """What an engine did, by worker, type and whether eager; each is started once."""
    requests = [Request(f"r{i}", prose(str(model_dir), 300 + 90 * i), 12) for i in range(3)]

    @cache
    def run(worker: str, dtype: str, eager: bool):
        engine = {"dtype": dtype, "enforce_eager": eager, "max_model_len": 1024, "max_num_seqs": 4}
        return offline(Spec(str(model_dir), worker, engine, requests), **{"stride": 1} if worker == "stream" else {})

    return run


def test_a_compiled_engine_gives_the_same_answers(served, dtype: str):
    assert served("stream", dtype, False).runs == served("plain", dtype, False).runs


# In bfloat16 the compiled engine may sample another token than the eager one, the plain one just as well.
@pytest.mark.parametrize(("in_float32", "moved"), [(False, 0.02), (True, 1e-4)], ids=["own type", "float32"])
def test_a_compiled_engine_is_captured_like_an_eager_one(served, dtype: str, in_float32: bool, moved: float):
    results = {eager: served("stream", "float32" if in_float32 else dtype, eager) for eager in (True, False)}
    rows = {
        eager: {(r.request_id, r.position): r for r in result.rows if r.phase != 1} for eager, result in results.items()
    }
    assert results[True].runs[0]["tokens"] == results[False].runs[0]["tokens"]
    assert len(rows[True]) == 3 * 12
    assert rows[True].keys() == rows[False].keys()
    differences = [
        0.5 * np.abs(rows[True][place].distribution() - rows[False][place].distribution()).sum(-1)
        for place in rows[True]
    ]
    # The compiler fuses and reorders sums; the captured distribution moves no more than that.
    assert np.quantile(differences, 0.99) < moved
