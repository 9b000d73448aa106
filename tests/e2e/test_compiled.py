"""Under torch.compile, vLLM's default, the capture sees what it sees without."""

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.offline_engine import Request, Spec
from tests.e2e.truth import prose

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(300)]


def test_a_compiled_engine_is_captured_like_an_eager_one(offline, model_dir: Path, dtype: str):
    requests = [Request(f"r{i}", prose(str(model_dir), 300 + 90 * i), 12) for i in range(3)]
    results = {
        eager: offline(
            Spec(
                str(model_dir),
                "stream",
                {"dtype": dtype, "enforce_eager": eager, "max_model_len": 1024, "max_num_seqs": 4},
                requests,
            ),
            stride=1,
        )
        for eager in (True, False)
    }
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
    assert np.quantile(differences, 0.99) < 0.02
