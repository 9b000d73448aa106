"""Engines of several ranks: what all ranks say together is what one rank says alone."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_monitor.v1alpha1 import monitor_pb2
from tests.e2e.conftest import OfflineResult, ledger, together
from tests.e2e.offline_engine import Request, Spec
from tests.e2e.recorder import rows_of
from tests.e2e.test_attention_kinds import random_ids
from tests.e2e.tiny_models import make_model
from tests.monitor.conftest import Running, Stream, starter

pytestmark = pytest.mark.engine

LAYERS, HEADS, NEW_TOKENS = 4, 4, 24
PROMPTS = {"a": 300, "b": 411, "c": 77}
TOLERANCE = 0.002
"""Of a share: ranks add up their parts of a layer's output in another order than one rank alone."""
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,  # prompts come in chunks
    "num_gpu_blocks_override": 200,
}
SETTINGS = {"strategy": "exact", "top_k": 32, "layers": "all", "heads": "all", "stride": 1, "max_heads": 64}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of four query heads, two to a KV head, in float32."""
    folder = tmp_path_factory.mktemp("qwen3")
    make_model(folder, "qwen3")
    return folder


MANY = {f"many{number}": 140 for number in range(160)}
"""Requests, and tokens of each prompt, of which a step with a row of each may be more than one message."""
MANY_TOKENS = 4
MANY_SETTINGS = {"top_k": 512, "layers": "0-2"}
"""Each row is large. Of two pipeline ranks the second watches one layer, and its steps stay whole."""
MANY_ENGINE = {"max_num_seqs": len(MANY), "max_num_batched_tokens": 1 << 15, "num_gpu_blocks_override": 1000}

Runner = Callable[..., OfflineResult]


@pytest.fixture(scope="session")
def run(offline: Runner, model: Path) -> Runner:
    """Decode PROMPTS, or MANY, with these engine arguments and settings; an engine is started once for each."""
    done: dict[str, OfflineResult] = {}

    def once(settings: dict[str, object] | None = None, many: bool = False, **engine: Any) -> OfflineResult:
        key = f"{engine} {settings} {many}"
        if key not in done:
            prompts, tokens = (MANY, MANY_TOKENS) if many else (PROMPTS, NEW_TOKENS)
            requests = [
                Request(name, random_ids(count, seed), tokens) for seed, (name, count) in enumerate(prompts.items())
            ]
            asked = SETTINGS | (MANY_SETTINGS if many else {}) | (settings or {})
            arguments = {**ENGINE, **(MANY_ENGINE if many else {}), **engine}
            done[key] = offline(Spec(str(model), "stream", arguments, requests), **asked)
        return done[key]

    return once


def ranks_of(result: OfflineResult) -> dict[tuple[int, int], list[Any]]:
    """Summaries by pipeline and tensor rank."""
    found: dict[tuple[int, int], list[Any]] = {}
    for summary in result.summaries:
        engine = summary.engine
        found.setdefault((engine.pipeline_parallel_rank, engine.tensor_parallel_rank), []).append(summary)
    return found


def whole_rows(result: OfflineResult) -> dict[tuple[str, int], NDArray[np.float64]]:
    """Shares by block of each row from which a token was sampled, put together from all ranks: [layers, heads, blocks];
    NaN where no rank has any."""
    found: dict[tuple[str, int], NDArray[np.float64]] = {}
    for summaries in ranks_of(result).values():
        engine = summaries[0].engine
        heads = [engine.first_query_head + head for head in engine.query_heads]
        for row in (row for row in rows_of(summaries) if row.phase != 1):
            shares = row.distribution()
            place = (row.request_id, row.position)
            whole = found.setdefault(place, np.full((LAYERS, HEADS, shares.shape[-1]), np.nan))
            assert np.isnan(whole[np.ix_(engine.layers, heads)]).all(), "two ranks have the same head"
            whole[np.ix_(engine.layers, heads)] = shares
    return found


def assert_equal_to_one_rank(result: OfflineResult, alone: OfflineResult) -> None:
    """Same tokens, same rows, every head of every layer there once and of the same shares."""
    assert all(status["capturing"] for status in result.statuses)
    assert result.runs[0]["tokens"] == alone.runs[0]["tokens"]
    rows, expected = whole_rows(result), whole_rows(alone)
    assert rows.keys() == expected.keys()
    assert len(rows) == len(PROMPTS) * NEW_TOKENS
    worst = max(np.abs(rows[place] - expected[place]).max() for place in rows)
    assert worst < TOLERANCE, worst  # NaN, a head that no rank sent, fails too


def assert_one_account(result: OfflineResult) -> None:
    """One engine instance; every rank's ledger adds up, and all ranks together expected what one rank would."""
    (instance,) = {summary.engine.instance for summary in result.summaries}
    assert {status["instance"] for status in result.statuses} == {instance}
    expected = 0
    for summaries in ranks_of(result).values():
        counts = ledger(summaries)
        assert counts["expected"] == sum(count for outcome, count in counts.items() if outcome != "expected")
        expected += counts["expected"]
    assert expected == len(PROMPTS) * NEW_TOKENS * LAYERS * HEADS


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts monitors."""
    yield from starter(tmp_path)


def traces(monitor: Running, result: OfflineResult, names: Iterable[str] = PROMPTS) -> dict[str, Any]:
    """What the monitor makes of what the ranks sent, in their order of arrival."""
    streams = {place: Stream(monitor) for place in ranks_of(result)}
    for summary in result.summaries:
        streams[summary.engine.pipeline_parallel_rank, summary.engine.tensor_parallel_rank].send(summary)
    for stream in streams.values():
        stream.close()
    return {name: monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id=name)) for name in names}


def assert_equal_traces(start: Callable[..., Running], tmp_path: Path, result: OfflineResult, alone: OfflineResult):
    """The merged sentence matrix, and the account of rows, are those of one rank."""
    merged = start(ingest=f"unix:{tmp_path / 'merged.sock'}")
    single = start(ingest=f"unix:{tmp_path / 'single.sock'}")
    found, expected = traces(merged, result), traces(single, alone)
    for name, trace in found.items():
        assert list(trace.info.missing_ranks) == []
        assert trace.info.rows_kept == expected[name].info.rows_kept == NEW_TOKENS
        assert trace.matrix_row == expected[name].matrix_row
        shares, wanted = (np.frombuffer(each.matrix_share, "<f4") for each in (trace, expected[name]))
        np.testing.assert_allclose(shares, wanted, atol=TOLERANCE)
        assert wanted.any()
    assert merged.metric("stream_monitor_steps_total", result="partial") == 0
    assert merged.metric("stream_monitor_steps_total", result="complete") > 0


@pytest.fixture(scope="session")
def alone_and_tensor(run: Runner) -> list[OfflineResult]:
    """One rank; two ranks, each with half of the heads."""
    return together(run, lambda: run(tensor_parallel_size=2))


@pytest.fixture(scope="session")
def alone(alone_and_tensor: list[OfflineResult]) -> OfflineResult:
    """One rank."""
    return alone_and_tensor[0]


@pytest.fixture(scope="session")
def tensor(alone_and_tensor: list[OfflineResult]) -> OfflineResult:
    """Two ranks, each with half of the heads."""
    return alone_and_tensor[1]


# vLLM 0.32 on CPUs makes what later pipeline ranks are sent in its warm-up, which eager mode skips
# (v1/worker/cpu_model_runner.py:84, v1/worker/gpu_model_runner.py:3174).
PIPELINE = {"pipeline_parallel_size": 2, "enforce_eager": False}


@pytest.fixture(scope="session")
def pipeline(run: Runner) -> OfflineResult:
    """Two ranks, each with half of the layers, at work on two batches at a time: other steps than one rank's."""
    return run(**PIPELINE)


@pytest.fixture(scope="session")
def many_alone(run: Runner) -> OfflineResult:
    """One rank, with many requests at a time."""
    return run(many=True)


@pytest.fixture(scope="session", params=["tensor", "pipeline"])
def many(request: pytest.FixtureRequest, run: Runner) -> tuple[dict[tuple[int, int], bool], OfflineResult]:
    """Two ranks with as many, and of which of them steps are to be cut."""
    if request.param == "tensor":
        return {(0, 0): True, (0, 1): True}, run(many=True, tensor_parallel_size=2)
    return {(0, 0): True, (1, 0): False}, run(many=True, **PIPELINE)


@pytest.fixture(scope="session", params=["0-1", "2-3"])
def bystander(request: pytest.FixtureRequest, run: Runner) -> tuple[OfflineResult, OfflineResult]:
    """Two pipeline ranks of which one watches nothing, and one rank alone that watches the same layers."""
    chosen = {"layers": request.param}
    return run(chosen, **PIPELINE), run(chosen)


def test_two_tensor_ranks_say_what_one_says(tensor, alone, monitor, tmp_path):
    assert {place: summaries[0].engine.first_query_head for place, summaries in ranks_of(tensor).items()} == {
        (0, 0): 0,
        (0, 1): 2,
    }
    assert tensor.runs[0]["schedule"] == alone.runs[0]["schedule"]
    assert_equal_to_one_rank(tensor, alone)
    assert_one_account(tensor)
    assert_equal_traces(monitor, tmp_path, tensor, alone)


@pytest.mark.long
def test_two_pipeline_ranks_say_what_one_says(pipeline, alone, monitor, tmp_path):
    layers = {place: list(summaries[0].engine.layers) for place, summaries in ranks_of(pipeline).items()}
    assert layers == {(0, 0): [0, 1], (1, 0): [2, 3]}
    assert_equal_to_one_rank(pipeline, alone)
    assert_one_account(pipeline)
    assert_equal_traces(monitor, tmp_path, pipeline, alone)


@pytest.mark.long
def test_a_pipeline_rank_that_watches_nothing_is_not_missed(bystander, monitor, tmp_path):
    split, alone = bystander
    assert all(status["capturing"] for status in split.statuses)
    assert_equal_traces(monitor, tmp_path, split, alone)


@pytest.mark.long
def test_ranks_that_cut_their_steps_unlike_are_joined(many, many_alone, monitor, tmp_path):
    cut, result = many
    assert {place: any(summary.more for summary in summaries) for place, summaries in ranks_of(result).items()} == cut
    assert result.runs[0]["tokens"] == many_alone.runs[0]["tokens"]
    rows, expected = whole_rows(result), whole_rows(many_alone)
    assert rows.keys() == expected.keys()
    assert len(rows) == len(MANY) * MANY_TOKENS
    for place, wanted in expected.items():
        np.testing.assert_allclose(rows[place], wanted, atol=TOLERANCE, err_msg=str(place))
        assert np.isfinite(wanted[:3]).all()
    joined = monitor()
    found = traces(joined, result, MANY)
    assert all(trace.info.rows_kept == MANY_TOKENS for trace in found.values())
    assert all(not trace.info.missing_ranks for trace in found.values())
    assert joined.metric("stream_monitor_steps_total", result="partial") == 0
    assert joined.metric("stream_monitor_steps_total", result="complete") > 0
