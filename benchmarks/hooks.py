"""What the plug-in's hooks take of the engine's runner thread, by the number of requests in a step.

The capture is the real one; scheduler outputs are made up, as vLLM 0.32 makes them for requests that all decode, with a
new block every 16 steps and tokens that arrive later, as under asynchronous scheduling. Slots take no copies, and there
is no forward pass: what is measured is the interpreter's work on labels, counts, blocks and tokens, which an engine
hides behind its device only as long as the device is the slower of the two. Steps are timed `rounds` times over; of
each number of requests the fastest round stands, since nothing makes a round faster than it is.
"""

import gc
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.report import Report, run
from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.capture import Capture
from stream_monitor.engine.compat.runner import BatchRows
from stream_monitor.engine.governor import Governor
from stream_monitor.engine.gpu.tables import HostTables
from stream_monitor.engine.hooks import install_runner_hooks
from stream_monitor.engine.requests import RequestTable

REQUESTS = (1, 8, 64, 256)
PROMPT, BLOCK, VOCABULARY = 64, 16, 1024
HEADS_PER_ROW = 128
MOST_SECONDS_PER_REQUEST = 5e-6
"""Of a step of 64 requests; what vLLM's own scheduler and output processor take is several times that."""


class Slot:
    """Takes every snapshot."""

    labels: list[Any] = []

    def open(self) -> None: ...

    def snapshot(self, batch: BatchRows, labels: list[Any], generation: int) -> str:
        self.labels = labels
        return ""


class StandIns:
    """Device, runner and estimator around a capture of `requests` requests, and the engine's two calls a step."""

    waits = 0
    search = None
    shares_cpus, processor_seconds, backlog = False, 0.0, 0

    def __init__(self, requests: int, stride: int) -> None:
        self.names = [f"chatcmpl-{number:032x}-0" for number in range(requests)]
        self.slots = [Slot() for _ in range(4)]
        self._tables = HostTables([0], [1 << 14])
        vocabulary = np.zeros(VOCABULARY, np.uint8)
        table = RequestTable(stride, requests, False, vocabulary, None, False)
        parts: Any = self
        self.capture = Capture(
            parts, False, parts, table, BlockGenerations(1 << 16), HEADS_PER_ROW, Governor(max_overhead=0.0)
        )
        install_runner_hooks(parts, self.capture)
        self.capture.arm(parts)

    def execute_model(self, output: Any) -> None: ...

    def sample_tokens(self, grammar: None) -> Any:
        result = SimpleNamespace(req_ids=self.names, sampled_token_ids=[[7] for _ in self.names])
        return SimpleNamespace(get_output=lambda: result)

    def block_tokens(self) -> list[int]:
        return [BLOCK]

    def batch(self) -> BatchRows:
        return BatchRows(list(self.names), [], [])

    def follow(self, step: Any) -> None:
        self._tables.follow(step)

    def take_tap_ns(self) -> int:
        return 0

    def stop(self) -> None: ...

    def step_begun(self) -> None: ...

    def submit(self, job: Any) -> None:
        if job.slot is not None:
            self.capture.release(job.slot)


def schedule(names: list[str], step: int) -> Any:
    """The SchedulerOutput of a step, counted from 0: every prompt, then a token of each request."""
    nothing: dict[str, Any] = {"req_ids": [], "num_computed_tokens": [], "num_output_tokens": [], "new_block_ids": []}
    cached, new = nothing, []
    if step == 0:
        parameters = SimpleNamespace(extra_args=None, ignore_eos=True)
        new = [
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=list(range(PROMPT)),
                sampling_params=parameters,
                num_computed_tokens=0,
                block_ids=(list(range(1 + 4 * number, 5 + 4 * number)),),
            )
            for number, name in enumerate(names)
        ]
    else:
        cached = {
            "req_ids": names,
            "num_computed_tokens": [PROMPT - 1 + step] * len(names),
            "num_output_tokens": [step] * len(names),
            "new_block_ids": [([5000 + step],) if step % BLOCK == 1 else None] * len(names),
        }
    tokens = 1 if step else PROMPT
    return SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(**cached, resumed_req_ids=set()),
        num_scheduled_tokens=dict.fromkeys(names, tokens),
        finished_req_ids=set(),
        preempted_req_ids=None,
        new_block_ids_to_zero=None,
        kv_cache_block_copies=None,
        scheduled_spec_decode_tokens={},
    )


def seconds_per_step(requests: int, steps: int, rounds: int, stride: int) -> dict[str, float]:
    """Of the fastest round, by hook."""
    parts = StandIns(requests, stride)
    outputs = [schedule(parts.names, step) for step in range(1 + rounds * steps)]
    gc.collect()
    gc.freeze()  # as vLLM does once its engine is up
    fastest: dict[str, float] = {}
    for number in range(-1, rounds):
        parts.capture.governor.hook_ns.clear()
        begin = 1 + number * steps
        for output in outputs[:1] if number < 0 else outputs[begin : begin + steps]:
            parts.execute_model(output)
            parts.sample_tokens(None).get_output()
        found = {hook: ns / steps / 1e9 for hook, ns in parts.capture.governor.hook_ns.items()}
        if number >= 0 and sum(found.values()) < sum(fastest.values() or [np.inf]):
            fastest = found
    gc.unfreeze()
    if parts.capture.fault:
        raise RuntimeError(parts.capture.fault)
    return fastest


def main(
    requests: Annotated[list[int] | None, typer.Option(help="Of a step.", min=1)] = None,
    steps: Annotated[int, typer.Option(help="In a round.", min=16)] = 160,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    stride: Annotated[int, typer.Option(help="As the setting of that name.", min=1)] = 4,
) -> None:
    """Time the hooks."""
    sizes = requests or list(REQUESTS)
    report = Report("hooks", {"requests": sizes, "steps": steps, "stride": stride}, 0, rounds)
    for count in sizes:
        found = seconds_per_step(count, steps, rounds, stride)
        total = sum(found.values())
        print(f"{count} requests: {total * 1e6:.1f} us a step, {total / count * 1e6:.2f} us a request", flush=True)
        report.figures[f"seconds per step, {count} requests"] = total
        report.figures |= {f"{hook}, {count} requests": value for hook, value in found.items()}
        if count == 64:
            report.figures["seconds per request of 64"] = total / count
            report.must["seconds per request of 64"] = ("<=", MOST_SECONDS_PER_REQUEST)
    report.finish()


if __name__ == "__main__":
    run(main)
