"""Under torch.compile, vLLM's default, the engine answers as without the plug-in, and the capture sees what it sees
without the compiler."""

from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.offline_engine import Request, Spec
from tests.e2e.truth import prose

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(600)]

OUTPUT = 12
MOVED = {"float32": 1e-4, "bfloat16": 0.05}
"""Most by which the compiler's sums move the captured distribution, total variation: bfloat16 keeps eight bits."""


@pytest.fixture(scope="module")
def arms(offline, model_dir: Path, dtype: str):
    """Worker and whether eager, to what an engine did."""
    requests = [Request(f"r{i}", prose(str(model_dir), 300 + 90 * i), OUTPUT) for i in range(3)]

    def run(worker: str, eager: bool):
        engine = {"dtype": dtype, "enforce_eager": eager, "max_model_len": 1024, "max_num_seqs": 4}
        return offline(Spec(str(model_dir), worker, engine, requests), **{"stride": 1} if worker == "stream" else {})

    return {arm: run(*arm) for arm in (("stream", True), ("stream", False), ("plain", False))}


def test_a_compiled_engine_gives_the_same_answers(arms):
    assert arms["stream", False].runs == arms["plain", False].runs


def test_a_compiled_engine_is_captured_like_an_eager_one(arms, dtype: str):
    """As far as both sampled the same: what the compiler fuses is rounded otherwise, and one token may turn on that."""
    eager, compiled = ([row for row in arms["stream", one].rows if row.phase != 1] for one in (True, False))
    assert len(eager) == len(compiled) == 3 * OUTPUT
    assert {(row.request_id, row.position) for row in eager} == {(row.request_id, row.position) for row in compiled}
    sampled, other = (arms["stream", one].runs[0]["tokens"] for one in (True, False))
    alike = {request: _alike(sampled[request][0], other[request][0]) for request in sampled}
    assert sum(alike.values()) >= OUTPUT, "too little to compare"
    seen = {(row.request_id, row.position): row.distribution() for row in compiled}
    first = {request: min(row.position for row in eager if row.request_id == request) for request in alike}
    differences = [
        0.5 * np.abs(row.distribution() - seen[row.request_id, row.position]).sum(-1)
        for row in eager
        # A row's own token was sampled by the row before.
        if row.position - first[row.request_id] <= alike[row.request_id]
    ]
    assert np.quantile(differences, 0.99) < MOVED[dtype]


def _alike(tokens: list[int], others: list[int]) -> int:
    """How many they have in common before the first that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=True)))
