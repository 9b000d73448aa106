"""The benchmark of a GPU's search goes through where there is none, so that the first GPU finds it in order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")


@pytest.mark.timeout(600)
def test_the_whole_benchmark_runs_interpreted() -> None:
    program = Path(__file__).with_name("gpu_search_interpreted.py")
    arguments = ["--context", "1024", "--batch", "1", "--batch", "2", "--group", "4", "--repeats", "1", "--layers", "2"]
    done = subprocess.run(
        [sys.executable, program, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 1, f"the musts are of other lengths: {done.stdout}{done.stderr}"
    found = json.loads(done.stdout.splitlines()[-1])
    figures = found["figures"]
    assert figures["graph_replay_gives_the_same"] == 1
    for batch in (1, 2):
        name = f"batch {batch}, context 1024, group 4"
        assert 0 < figures[f"reads, {name}"] < 1, "fewer than all keys, since context is longer than what is read whole"
        assert figures[f"search/attention, {name}"] > 0
        assert figures[f"most, {name}"] > 0
    assert found["config"]["layers"] == {"1x1024": 2, "2x1024": 2}
