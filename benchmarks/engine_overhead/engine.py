"""One engine of the comparison, in a process of its own: `python -m benchmarks.engine_overhead.engine SETTINGS`.

Reads one JSON object a line from standard input and answers each with one on standard output. The engine core runs in
this process and is stepped by hand, so that every request is queued before the first step and all engines follow the
same schedule. On a CPU the worker is a process of its own, as in a server; on a GPU it is in the core's, as there.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.engine_process import serve


@dataclass(frozen=True)
class Settings:
    """What to start.

    Attributes:
        engine: arguments of vLLM's EngineArgs.
        captures: whether rows will be captured, so that there is an account of them.
    """

    engine: dict[str, Any]
    captures: bool


class Engine:
    """The engine, and what is asked of it."""

    def __init__(self, settings: Settings) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._captures = settings.captures
        begin = time.perf_counter()
        self._engine = LLMEngine.from_engine_args(EngineArgs(**settings.engine))
        self._core = self._engine.engine_core.engine_core
        self._schedule: list[dict[int, int]] = []
        self._runs = 0
        native = self._core.scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = native(*args, **kwargs)
            self._schedule.append({_number(id_): tokens for id_, tokens in output.num_scheduled_tokens.items()})
            return output

        self._core.scheduler.schedule = schedule
        self.started = {"start_seconds": time.perf_counter() - begin, "compilations": self._compilations()}

    def run(self, prompts: list[list[int]], new_tokens: int, paused: bool) -> dict[str, Any]:
        """Decode all prompts at once; when each token came, what it was, and how the steps were made up; `paused`: with
        the capture switched off for that time, and no account of it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        before, (status,) = self._account(), self._core.model_executor.collective_rpc(_status)
        if paused:
            self._core.model_executor.collective_rpc("stream_monitor_pause")
        self._schedule.clear()
        stamps: list[list[float]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        begin = time.perf_counter()
        self._runs += 1
        for number, prompt in enumerate(prompts):
            self._engine.add_request(f"{self._runs}.{number}", {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter() - begin
            for output in outputs:
                number, ids = _number(output.request_id), list(output.outputs[0].token_ids)
                stamps[number] += [now] * (len(ids) - len(stamps[number]))
                tokens[number] = ids
        seconds = time.perf_counter() - begin
        if paused:
            self._core.model_executor.collective_rpc("stream_monitor_resume")
        after = {} if paused else self._account()
        return {
            "seconds": seconds,
            "stamps": stamps,
            "tokens": tokens,
            "schedule": self._schedule,
            "steps": status.get("steps", 0),
            "stride": 0 if paused else status.get("stride", 0),
            "account": {key: after[key] - before.get(key, 0.0) for key in after},
        }

    def memory(self) -> dict[str, float]:
        """Bytes of memory that this engine's processes have for themselves, and that its GPU has given it."""
        import torch

        process = psutil.Process()
        family = [process, *process.children(recursive=True)]
        found = {"host_bytes": float(sum(each.memory_full_info().uss for each in family))}
        if torch.cuda.is_available():
            found["gpu_bytes"] = float(torch.cuda.max_memory_allocated())
        return found

    def compilations(self) -> dict[str, int]:
        """vLLM's counts of what was compiled and captured since the start (compilation/counter.py)."""
        return self._compilations()

    def stop(self) -> None:
        """End the engine's processes."""
        self._engine.engine_core.shutdown()

    def _compilations(self) -> dict[str, int]:
        (counts,) = self._core.model_executor.collective_rpc(_count_compilations)
        return dict(counts)

    def _account(self) -> dict[str, float]:
        """Rows, bytes and seconds of the capture so far, once nothing is in flight; {} without a capture."""
        if not self._captures:
            return {}
        deadline = time.monotonic() + 60
        while True:
            (status,) = self._core.model_executor.collective_rpc("stream_monitor_status")
            if status["backlog"] == 0:
                break
            if time.monotonic() > deadline:
                raise RuntimeError("the search does not keep up: its backlog has not emptied in a minute")
            time.sleep(0.05)
        if not status["capturing"]:
            raise RuntimeError(f"nothing is captured: {status['reason']}")
        ledger = status["ledger"]
        rows = {"expected": 0, "captured": 0, "sampled_out": 0, "governed": 0}
        for kind in ("token_rows", "chunk_rows"):
            for name in rows:
                rows[name] += ledger[kind][name]
        hooks = {f"hook: {name}": ns / 1e9 for name, ns in status["hook_ns"].items()}
        return (
            rows
            | hooks
            | {
                "record_bytes": ledger["record_bytes"],
                "estimate_seconds": ledger["estimate_seconds"],
                "estimates": ledger["estimates"],
            }
        )


def _number(request_id: str) -> int:
    """`run.number` -> number."""
    return int(request_id.partition(".")[2])


def _status(worker: Any) -> dict[str, Any]:
    """Of the plug-in; {} without one. Runs in the worker."""
    return worker.stream_monitor_status() if hasattr(worker, "stream_monitor_status") else {}


def _count_compilations(worker: Any) -> dict[str, int]:
    """Runs in the worker."""
    from vllm.compilation.counter import compilation_counter

    return {name: value for name, value in vars(compilation_counter).items() if isinstance(value, int)}


def main(settings: str) -> None:
    """Serve one engine until standard input ends."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function is handed to a worker of our own
    serve(lambda: Engine(Settings(**json.loads(settings))))


if __name__ == "__main__":
    main(*sys.argv[1:])
