"""The capture of one worker: what happens before a step, after its forward pass and after its sampling.

All three run on the runner thread and only label, copy and count; the search is the estimator thread's. Nothing here
waits, and hooks.py turns any exception into a fault that ends capture while decoding goes on.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.compat import ScheduledStep, read_batch_v1, read_schedule, sampled_tokens
from stream_monitor.engine.estimator import Estimator
from stream_monitor.engine.ledger import count, snapshot
from stream_monitor.engine.requests import RequestTable, RowLabel
from stream_monitor.engine.steps import Job, LayerTap, StepSlot
from stream_monitor.records import Ledger, QueueState, RequestFinished, RequestStarted, TokenRun

log = logging.getLogger("vllm.stream_monitor")

CAPTURE_OFF = "capture_off"
ESTIMATOR_BUSY = "estimator_busy"
MAX_FAULT = 200
"""Characters of a fault that travel; the log has all of it."""
MAX_BACKLOG = 256
"""Jobs that may wait for the estimator. Those with rows are bounded by the slots; this bounds the ones without."""


@dataclass
class _CurrentStep:
    """The step between `before_step` and its submission."""

    number: int
    positions: dict[str, int]
    sampled: list[RowLabel]
    slot: StepSlot | None
    forward_end_ns: int = 0


class Capture:
    """Runner-thread side of the capture.

    Args:
        runner: vLLM's model runner.
        block_tokens: tokens per scheduler block, per KV cache group.
        connector: whether a KV connector is configured.
        taps: of the watched layers, in plan order.
        slots: free buffers.
        table: requests and labels.
        generations: shared with the estimator.
        heads_per_row: watched (layer, head) pairs of this rank.
    """

    def __init__(
        self,
        runner: Any,
        block_tokens: list[int],
        connector: bool,
        taps: list[LayerTap],
        slots: list[StepSlot],
        table: RequestTable,
        generations: BlockGenerations,
        heads_per_row: int,
    ) -> None:
        self._runner = runner
        self._block_tokens = block_tokens
        self._connector = connector
        self._taps = taps
        self._slots = len(slots)
        self._free: deque[StepSlot] = deque(slots)
        self._table = table
        self._generations = generations
        self._heads = heads_per_row
        self._ledger = Ledger()
        self._steps = 0
        self._current: _CurrentStep | None = None
        self._started: list[RequestStarted] = []
        self._tokens: list[TokenRun] = []
        self._finished: list[RequestFinished] = []
        self._estimator: Estimator | None = None
        self._reported = ""

    def arm(self, estimator: Estimator) -> None:
        """Begin to capture: warm-up is over and the estimator thread runs."""
        self._estimator = estimator

    @property
    def fault(self) -> str:
        """Why capture went off by itself; empty while it works."""
        return self._ledger.fault

    @property
    def ledger(self) -> Ledger:
        """The runner thread's counts."""
        return self._ledger

    def release(self, slot: StepSlot) -> None:
        """The estimator is done with a slot (called on its thread; deque operations are atomic)."""
        self._free.append(slot)

    def fail(self, reason: str) -> None:
        """Turn capture off for good and say so once. Rows from now on are refused `capture_off`."""
        if self._ledger.fault:
            return
        self._ledger.fault = " ".join(reason.split())[:MAX_FAULT]
        log.error("Stream Monitor: capture is off, decoding goes on: %s", reason)
        for tap in self._taps:
            tap.slot = None
        if self._current is not None and self._current.slot is not None:
            count(self._ledger, self._current.sampled, "dropped", "fault", self._heads)
            self._free.append(self._current.slot)
            self._current.slot = None

    def report(self, reason: str) -> None:
        """Another thread met a fault; the runner thread acts on it before its next step."""
        self._reported = reason

    def before_step(self, scheduler_output: Any) -> None:
        """Label the rows of the coming step, mark blocks it may rewrite, and point the taps at a free slot."""
        if self._estimator is None:
            return
        if self._reported:
            self.fail(self._reported)
        step = read_schedule(scheduler_output, self._block_tokens, self._connector)
        self._steps += 1
        self._mark_rewritten(step)
        self._follow_requests(step)
        labels = [self._table.label(request) for request in step.requests]
        sampled = self._count_and_sample(labels)
        slot = self._acquire(sampled)
        for tap in self._taps:
            tap.slot = slot
        positions = {label.request_id: label.position for label in labels}
        self._current = _CurrentStep(self._steps, positions, sampled, slot)

    def after_forward(self, sampling_follows: bool) -> None:
        """Copy what locates the sampled rows' keys, before the runner's buffers change."""
        current = self._current
        if current is None:
            return
        current.forward_end_ns = time.time_ns()
        if current.slot is not None:
            self._close_taps(current.slot)
        if not sampling_follows:
            self._submit(current)

    def after_sampling(self, output: Any) -> None:
        """Note the sampled tokens and hand the step to the estimator."""
        current = self._current
        if current is None:
            return
        for request_id, token_ids in sampled_tokens(output).items():
            self._table.add_tokens(request_id, current.positions[request_id] + 1, token_ids)
        self._submit(current)

    def invalidate(self) -> None:
        """The KV cache may change as a whole: wait until no search reads it, and let no older row pass."""
        if self._estimator is not None and not self._estimator.drain(timeout=10.0):
            self.fail("the estimator did not finish before the KV cache was replaced")
        self._generations.mark_all()

    def close(self) -> None:
        """Submit what is left, with the final counts."""
        if self._estimator is not None:
            self._estimator.submit(self._job(self._steps, time.time_ns(), None))

    def _mark_rewritten(self, step: ScheduledStep) -> None:
        self._generations.next_step()
        self._generations.mark(step.rewritten_blocks)
        for request in step.requests:
            self._generations.mark(request.rewritten_blocks)

    def _follow_requests(self, step: ScheduledStep) -> None:
        for request_id in step.finished:
            if (end := self._table.finish(request_id)) is not None:
                last, finished = end
                self._tokens += last
                self._finished.append(finished)
        self._started += [started for new in step.new if (started := self._table.start(new)) is not None]
        for request_id in step.resumed:
            self._table.resume(request_id)
        self._ledger.refused_arguments = dict(self._table.refused_arguments)

    def _count_and_sample(self, labels: list[RowLabel]) -> list[RowLabel]:
        """Count every row of the step once; return those to be searched."""
        count(self._ledger, labels, "expected", "", self._heads)
        sampled = []
        for label in labels:
            if label.refused_reason:
                count(self._ledger, [label], "refused", label.refused_reason, self._heads)
            elif not label.sampled:
                count(self._ledger, [label], "sampled_out", "", self._heads)
            elif self._ledger.fault:
                count(self._ledger, [label], "refused", CAPTURE_OFF, self._heads)
            else:
                sampled.append(label)
        return sampled

    def _acquire(self, sampled: list[RowLabel]) -> StepSlot | None:
        if not sampled:
            return None
        try:
            slot = self._free.popleft()
        except IndexError:
            count(self._ledger, sampled, "dropped", ESTIMATOR_BUSY, self._heads)
            return None
        slot.taken[:] = 0
        return slot

    def _close_taps(self, slot: StepSlot) -> None:
        """Check that every watched layer left exactly the batch's rows, then copy tables."""
        batch = read_batch_v1(self._runner)
        for layer, tap in enumerate(self._taps):
            tap.slot = None
            if tap.fault:
                return self.fail(tap.fault)
            if slot.taken[layer] != len(batch.request_ids):
                return self.fail(
                    f"watched layer {layer} left {slot.taken[layer]} query rows where the batch has "
                    f"{len(batch.request_ids)}"
                )
        assert self._current is not None
        slot.snapshot(batch, self._current.sampled, self._generations.now)
        return None

    def _submit(self, current: _CurrentStep) -> None:
        assert self._estimator is not None
        self._current = None
        if current.slot is None and not self._started and not self._finished:
            return
        if self._estimator.backlog > MAX_BACKLOG:
            self.fail(f"the estimator is {MAX_BACKLOG} steps behind")
        self._estimator.submit(self._job(current.number, current.forward_end_ns, current.slot))

    def _job(self, step: int, wall_time_ns: int, slot: StepSlot | None) -> Job:
        self._ledger.queues = [QueueState("estimator", self._slots - len(self._free), self._slots)]
        job = Job(
            step,
            wall_time_ns,
            snapshot(self._ledger),
            slot,
            self._started,
            self._tokens + self._table.take_tokens(),
            self._finished,
        )
        self._started, self._tokens, self._finished = [], [], []
        return job
