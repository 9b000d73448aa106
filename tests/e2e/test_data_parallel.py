"""Two data-parallel engine cores and one monitor: each request is traced where it ran, as the other core would."""

import os
import uuid
from collections.abc import Iterator

import grpc
import httpx
import numpy as np
import pytest

from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc
from tests.e2e.serving import Product, eventually, total
from tests.e2e.test_attention_kinds import random_ids
from tests.e2e.tiny_models import make_model

pytestmark = [pytest.mark.engine, pytest.mark.long]

PROMPTS = {"a": 300, "b": 411}
NEW_TOKENS, HEADS = 16, 16
FLAGS = (
    "--dtype float32 --enforce-eager --max-model-len 1024 --max-num-seqs 4 --num-gpu-blocks-override 200 "
    "--served-model-name tiny --generation-config vllm --no-enable-prefix-caching --data-parallel-size 2"
)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """Two cores of a tiny model on a CPU each."""
    folder = tmp_path_factory.mktemp("parallel")
    make_model(folder / "model", "qwen3")
    cpus = sorted(os.sched_getaffinity(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cpus[0]}|{cpus[-1]}")
        running = Product(
            folder / "model", folder, FLAGS.split(), stride=1, layers="all", heads="all", max_heads=64, strategy="exact"
        )
    yield running
    running.stop()


def ask(product: Product, prompt: str, rank: int) -> tuple[str, str]:
    """One completion on this data-parallel rank; its id and text."""
    body = {
        "model": "tiny",
        "prompt": random_ids(PROMPTS[prompt], PROMPTS[prompt]),
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    name = f"{prompt}{rank}-{uuid.uuid4().hex}"
    answer = httpx.post(
        f"{product.engine_http}/v1/completions",
        json=body,
        headers={"X-data-parallel-rank": str(rank), "X-Request-Id": name},
        timeout=120,
        trust_env=False,
    ).json()
    return answer["id"], answer["choices"][0]["text"]


def test_both_cores_are_one_engine_and_say_the_same(product):
    api = monitor_pb2_grpc.MonitorServiceStub(grpc.insecure_channel(product.grpc_address))
    answers = {(prompt, rank): ask(product, prompt, rank) for prompt in PROMPTS for rank in (0, 1)}

    def finished() -> list[monitor_pb2.RequestInfo]:
        listed = api.ListRequests(monitor_pb2.ListRequestsRequest()).requests
        return [info for info in listed if info.state == monitor_pb2.REQUEST_STATE_FINISHED]

    # vLLM tells its workers of a request's end with the next step, so an end needs another request behind it.
    for rank in (0, 1):
        ask(product, "a", rank)
    assert eventually(lambda: len(finished()) >= len(answers), 60)
    traces = {place: api.GetTrace(monitor_pb2.GetTraceRequest(request_id=id_)) for place, (id_, _) in answers.items()}
    assert len({trace.info.key.engine_instance for trace in traces.values()}) == 1
    for prompt in PROMPTS:
        one, two = traces[prompt, 0], traces[prompt, 1]
        assert (one.info.engine, two.info.engine) == ("0", "1")
        assert answers[prompt, 0][1] == answers[prompt, 1][1]
        assert one.row_positions == two.row_positions
        assert len(one.row_positions) == 4 * NEW_TOKENS
        assert one.matrix_row == two.matrix_row
        np.testing.assert_array_equal(np.frombuffer(one.matrix_share, "<f4"), np.frombuffer(two.matrix_share, "<f4"))
        assert np.frombuffer(one.matrix_share, "<f4").any()
    assert total(product.monitor_http, "stream_monitor_steps_total", result="partial") == 0
    for rank in ("0", "1"):
        assert total(product.monitor_http, "stream_monitor_ranks_connected", engine=rank) == 1
        expected = total(product.monitor_http, "stream_monitor_rows_expected_total", engine=rank, phase="token")
        became = total(product.monitor_http, "stream_monitor_rows_total", engine=rank, phase="token")
        assert expected == became >= 2 * NEW_TOKENS * HEADS
