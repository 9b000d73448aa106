"""One real vLLM engine in a process of its own, stepped by hand so that two runs can follow the same schedule.

`python -m tests.e2e.offline_engine SPEC.json RESULT.json`. The engine core runs in this process
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`), and so does the worker unless there are several ranks. All requests are queued
before the first step, and aborts happen at fixed steps.
"""

import json
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STREAM_WORKER = "stream_monitor.engine.worker.StreamWorker"


@dataclass
class Request:
    """A prompt and its sampling; `abort_before_step` ends it from outside."""

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    seed: int | None = None
    abort_before_step: int | None = None


@dataclass
class Spec:
    """What to run. `worker` is "plain" or "stream".

    The requests run `repeat` times, with an empty prefix cache; from the second run on their ids end in `@1`, `@2`, ...
    and each search is delayed by `slow_estimator` seconds.
    """

    model: str
    worker: str
    engine: dict[str, Any]
    requests: list[Request]
    hash_attention: bool = False
    slow_estimator: float = 0.0
    repeat: int = 1


@dataclass
class Run:
    """What one pass over the requests gave.

    Attributes:
        tokens: sampled ids of every request, per sample.
        schedule: per step, tokens scheduled for each request (ids without their random suffix).
        attention: per step, CRC-32 of every layer's attention inputs and outputs, in layer order.
        preempted: requests that were preempted at least once.
        cached_tokens: prompt tokens served from the prefix cache, per request.
    """

    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    schedule: list[dict[str, int]] = field(default_factory=list)
    attention: list[list[tuple[int, int]]] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    cached_tokens: dict[str, int] = field(default_factory=dict)


def main(spec_path: str, result_path: str) -> None:
    """Run a spec, write the runs and the worker's own status."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Request ids as given, so that runs can be compared (v1/engine/input_processor.py).
    os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
    spec = json.loads(Path(spec_path).read_text())
    bind_ranks(max(spec["engine"].get(f"{axis}_parallel_size", 1) for axis in ("tensor", "pipeline")))
    requests = [Request(**request) for request in spec.pop("requests")]
    result = run(Spec(requests=requests, **spec))
    Path(result_path).write_text(json.dumps(result))


def bind_ranks(ranks: int) -> None:
    """A CPU for each of several ranks (utils/ompmultiprocessing.py); vLLM's own choice wants one more than that."""
    if ranks > 1:
        cpus = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(cpus[n % len(cpus)]) for n in range(ranks)))


def run(spec: Spec) -> dict[str, Any]:
    """Start the engine, run the requests `repeat` times with the prefix cache emptied in between, shut down."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    worker = {"worker_cls": STREAM_WORKER} if spec.worker == "stream" else {}
    engine = LLMEngine.from_engine_args(EngineArgs(model=spec.model, **spec.engine, **worker))
    core = engine.engine_core.engine_core
    executor = core.model_executor
    native = executor.driver_worker.worker if hasattr(executor, "driver_worker") else None
    hashes: list[tuple[int, int]] = []
    if spec.hash_attention:
        _hash_attention(native, hashes)
    runs = []
    for number in range(spec.repeat):
        if number and spec.slow_estimator:
            _slow_down(native, spec.slow_estimator)
        runs.append(_run_once(engine, core.scheduler, spec.requests, f"@{number}" if number else "", hashes))
        engine.reset_prefix_cache()
    statuses = executor.collective_rpc("stream_monitor_status") if spec.worker == "stream" else [{}]
    if native is not None:
        layers = native.vllm_config.compilation_config.static_forward_context.values()
        attention = [type(layer.impl).__module__ for layer in layers if hasattr(layer, "impl")]
        statuses[0]["native_backend"] = all(module.startswith("vllm.") for module in attention)
    engine.engine_core.shutdown()
    return {"runs": [asdict(run) for run in runs], "statuses": statuses}


def _run_once(engine: Any, scheduler: Any, requests: list[Request], suffix: str, hashes: list[tuple[int, int]]) -> Run:
    from vllm import SamplingParams

    result = Run()
    for request in requests:
        params = SamplingParams(
            n=request.n,
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=request.max_tokens,
            ignore_eos=True,
        )
        engine.add_request(request.request_id + suffix, {"prompt_token_ids": request.prompt_token_ids}, params)
        result.tokens[request.request_id] = [[] for _ in range(request.n)]

    def bare(request_id: str) -> str:
        return request_id.removesuffix(suffix) if suffix else request_id

    native_schedule: Callable[[], Any] = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = native_schedule(*args, **kwargs)
        result.schedule.append({bare(id_): tokens for id_, tokens in output.num_scheduled_tokens.items()})
        result.preempted += sorted(map(bare, output.scheduled_cached_reqs.resumed_req_ids))
        return output

    scheduler.schedule = schedule
    while engine.has_unfinished_requests():
        for request in requests:
            if request.abort_before_step == len(result.schedule):
                engine.abort_request([request.request_id + suffix])
        hashes.clear()
        for output in engine.step():
            for sample in output.outputs:
                result.tokens[bare(output.request_id)][sample.index] = list(sample.token_ids)
            result.cached_tokens[bare(output.request_id)] = output.num_cached_tokens or 0
        result.attention.append(list(hashes))
    scheduler.schedule = native_schedule
    return result


def _hash_attention(worker: Any, hashes: list[tuple[int, int]]) -> None:
    """Append a CRC of each attention call's query and of its output, in the order of the calls."""
    import torch

    def crc(tensor: torch.Tensor) -> int:
        return zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy())

    def hooked(impl: Any) -> Callable[..., Any]:
        native = impl.forward

        def forward(layer: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            before = crc(query)
            output = native(layer, query, *args, **kwargs)
            hashes.append((before, crc(output)))
            return output

        return forward

    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        if hasattr(layer, "impl"):
            layer.impl.forward = hooked(layer.impl)


def _slow_down(worker: Any, seconds: float) -> None:
    """Sleep in the estimator thread before each search, long enough for blocks to change hands meanwhile."""
    import time

    search = worker.stream_installation.search
    native = search.run

    def run(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return native(*args, **kwargs)

    search.run = run


if __name__ == "__main__":
    main(*sys.argv[1:])
