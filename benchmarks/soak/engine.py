"""One engine of the soak in a process of its own: `python -m benchmarks.soak.engine ARGUMENTS`.

Reads one JSON object a line and answers each with one. The engine core runs in this process and is stepped by hand:
requests are added and ended before fixed steps, so that two engines follow one schedule whatever happens beside them.
"""

import json
import os
import sys
import time
from typing import Any

from benchmarks.engine_process import serve


class Engine:
    """The engine, and what is asked of it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._core = self._engine.engine_core.engine_core
        self._schedule: list[dict[str, int]] = []
        self._preempted = 0
        native = self._core.scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = native(*args, **kwargs)
            self._schedule.append(dict(output.num_scheduled_tokens))
            self._preempted += len(output.scheduled_cached_reqs.resumed_req_ids)
            return output

        self._core.scheduler.schedule = schedule
        self.started = {"pid": os.getpid()}

    def run(self, asked: list[dict[str, Any]], prompts: list[list[int]]) -> dict[str, Any]:
        """Serve a round; what was sampled, how steps were made up, and how often a request was preempted."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._schedule.clear()
        self._preempted = 0
        tokens: dict[str, list[int]] = {each["request_id"]: [] for each in asked}
        waiting = sorted(asked, key=lambda each: (each["add_at"], each["request_id"]))
        step = 0
        while waiting or self._engine.has_unfinished_requests():
            if waiting and not self._engine.has_unfinished_requests():
                step = max(step, waiting[0]["add_at"])
            while waiting and waiting[0]["add_at"] <= step:
                each = waiting.pop(0)
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=each["max_tokens"],
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.CUMULATIVE,
                )
                prompt = {"prompt_token_ids": prompts[each["prompt"]]}
                self._engine.add_request(each["request_id"], prompt, params)
            ended = [each["request_id"] for each in asked if each["abort_at"] == step]
            if ended:
                self._engine.abort_request(ended)
            for output in self._engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
        self._engine.reset_prefix_cache()
        return {"tokens": tokens, "schedule": list(self._schedule), "preempted": self._preempted}

    def drain(self) -> dict[str, Any]:
        """The plug-in's status once every search is done. A request of one token tells the worker of the last ends."""
        one = {"request_id": "last", "prompt": 0, "max_tokens": 1, "add_at": 0, "abort_at": None}
        self.run([one], [[1, 2, 3, 4]])
        deadline = time.monotonic() + 60
        while True:
            (status,) = self._core.model_executor.collective_rpc("stream_monitor_status")
            if status["backlog"] == 0 or time.monotonic() > deadline:
                return dict(status)
            time.sleep(0.05)

    def stop(self) -> None:
        """End the engine's processes."""
        self._engine.engine_core.shutdown()


if __name__ == "__main__":
    serve(lambda: Engine(json.loads(sys.argv[1])))
