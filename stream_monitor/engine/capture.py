"""The capture of one worker: what happens before a step, after its forward pass and after its sampling.

All three run on the runner thread and only label, copy and count; the search is the estimator thread's. Nothing here
waits, and hooks.py turns any exception into a fault that ends capture while decoding goes on.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.compat.runner import RunnerView, has_tokens, is_pending, misplaced, sampled_tokens
from stream_monitor.engine.compat.schedule import ScheduledRequest, ScheduledStep, read_schedule
from stream_monitor.engine.device import Device, StepSlot
from stream_monitor.engine.drafts import Drafts, Fate
from stream_monitor.engine.estimator import Estimator
from stream_monitor.engine.governor import Governor
from stream_monitor.engine.ledger import count, snapshot
from stream_monitor.engine.requests import MOST_WAITING, RequestTable, RowLabel
from stream_monitor.engine.steps import Job
from stream_monitor.records import Ledger, QueueState, RequestFinished, RequestStarted, TokenRun

log = logging.getLogger("vllm.stream_monitor")

CAPTURE_OFF = "capture_off"
PAUSED = "paused"
ESTIMATOR_BUSY = "estimator_busy"
MAX_FAULT = 200
"""Characters of a fault that travel; the log has all of it."""
MAX_BACKLOG = 256
"""Jobs that may wait for the estimator. Those with rows are bounded by the slots; this bounds the ones without."""


@dataclass
class _CurrentStep:
    """The step between `before_step` and its submission. `tokens` has those of each request, where rows of prompts are
    captured."""

    number: int
    positions: dict[str, int]
    sampled: list[RowLabel]
    slot: StepSlot | None
    drafts: Drafts
    fresh: list[ScheduledRequest]
    tokens: dict[str, int]
    forward_end_ns: int = 0


class Capture:
    """Runner-thread side of the capture.

    Args:
        runner: vLLM's model runner.
        connector: whether a KV connector is configured.
        device: brings the slots.
        table: requests and labels.
        generations: shared with the estimator.
        heads_per_row: watched (layer, head) pairs of this rank.
        governor: decides how much more sparsely rows are sampled.
    """

    def __init__(
        self,
        runner: RunnerView,
        connector: bool,
        device: Device,
        table: RequestTable,
        generations: BlockGenerations,
        heads_per_row: int,
        governor: Governor,
    ) -> None:
        self._runner = runner
        self._block_tokens = runner.block_tokens()
        self._connector = connector
        self._blocks_of: dict[str, list[int]] = {}
        self._device = device
        self._slots = len(device.slots)
        self._free: deque[StepSlot] = deque(device.slots)
        self._table = table
        self._generations = generations
        self._heads = heads_per_row
        self.governor = governor
        self.paused = False
        """Whether rows are refused for the time being; requests are followed all the same."""
        self._ledger = Ledger()
        self.steps = 0
        """Engine steps since capture began."""
        self._current: _CurrentStep | None = None
        self._started: list[RequestStarted] = []
        self._tokens: list[TokenRun] = []
        self._arrived: deque[tuple[dict[str, int], dict[str, list[int]]]] = deque()
        self._finished: list[RequestFinished] = []
        self._estimator: Estimator | None = None
        self._reported = ""

    def arm(self, estimator: Estimator) -> None:
        """Begin to capture: warm-up is over and the estimator thread runs."""
        self._estimator = estimator

    @property
    def stride(self) -> int:
        """One row in so many positions is sampled now, unless the capture is paused or off."""
        return self._table.stride

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
        self._device.stop()
        if self._current is not None and self._current.slot is not None:
            self._drop(self._current.sampled, "fault", self._current.drafts)
            self._free.append(self._current.slot)
            self._current.slot = None
        if self._estimator is not None:
            # With nothing captured any more no step may be handed on for long.
            try:
                self._estimator.submit(self._job(self.steps, time.time_ns(), None, None))
            except Exception:  # what failed may be what this needs; the log has the reason all the same
                log.debug("Stream Monitor: the fault goes with a later step", exc_info=True)

    def report(self, reason: str) -> None:
        """Another thread met a fault; the runner thread acts on it before its next step."""
        self._reported = reason

    def before_step(self, scheduler_output: Any) -> None:
        """Label the rows of the coming step, mark blocks it may rewrite, and point the taps at a free slot."""
        if self._estimator is None:
            return
        if self._reported:
            self.fail(self._reported)
        self._govern()
        step = read_schedule(scheduler_output, self._block_tokens, self._connector)
        self.steps += 1
        self._table.step = self.steps
        self._mark_rewritten(step)
        self._device.follow(step)
        if step.finished or step.new or step.resumed or len(self._arrived) >= MOST_WAITING:
            self._take_arrived()
        self._follow_requests(step)
        drafts = Drafts({r.request_id: self._table.drafted(r) for r in step.requests if r.draft_tokens})
        labels = [row for request in step.requests if not request.draft_tokens for row in self._table.rows(request)]
        positions = {label.request_id: label.position for label in labels}
        for request_id, rows in drafts.rows.items():
            positions[request_id] = rows[0].position
            labels += rows
        sampled = self._count_and_sample(labels, drafts)
        slot = self._acquire(sampled, drafts)
        fresh = [request for request in step.requests if request.fresh]
        tokens = {r.request_id: r.scheduled_tokens for r in step.requests} if self._table.reads_prompts else {}
        self._current = _CurrentStep(self.steps, positions, sampled, slot, drafts, fresh, tokens)
        self._estimator.step_begun()

    def _govern(self) -> None:
        assert self._estimator is not None
        if self._estimator.shares_cpus:
            self.governor.add_shared(self._estimator.processor_seconds)
        self.governor.add("taps", self._device.take_tap_ns())
        self.governor.next_step(time.perf_counter_ns())
        if self._table.factor != self.governor.factor:
            self._table.factor = self.governor.factor
            log.warning(
                "Stream Monitor: capture took %.2f%% of the engine's time; one row in %d positions is sampled now",
                100 * self.governor.overhead,
                self._table.stride,
            )

    def after_forward(self, sampling_follows: bool) -> None:
        """Copy what locates the sampled rows' keys, before the runner's buffers change."""
        current = self._current
        if current is None:
            return
        current.forward_end_ns = time.time_ns()
        if current.slot is not None:
            batch = self._runner.batch()
            if current.tokens:
                batch = replace(batch, query_tokens=[current.tokens[name] for name in batch.request_ids])
            fault = misplaced(batch, current.fresh)
            fault = fault or current.slot.snapshot(batch, current.sampled, self._generations.now)
            if fault:
                self.fail(fault)
        if not sampling_follows:
            self._submit(current)

    def after_sampling(self, output: Any) -> None:
        """Note the sampled tokens and hand the step to the estimator."""
        current = self._current
        if current is None:
            return
        if is_pending(output):
            self._await_tokens(output, current.positions)
        else:
            self._arrived.append((current.positions, sampled_tokens(output)))
        if current.drafts.rows:
            self._reject_drafts(current, output)
        self._submit(current)

    def _reject_drafts(self, current: _CurrentStep, output: Any) -> None:
        if is_pending(output) or not has_tokens(output):
            self.fail("which draft tokens were accepted is not known on this rank")
            return
        rejected = current.drafts.rejected(sampled_tokens(output))
        current.drafts.take_back(self._ledger, rejected, self._heads)
        if current.slot is None or not rejected:
            return
        gone = set(rejected)
        kept = [row for row, label in enumerate(current.sampled) if label not in gone]
        current.slot.keep(kept)
        if not kept:
            self._free.append(current.slot)
            current.slot = None

    def _await_tokens(self, output: Any, positions: dict[str, int]) -> None:
        """The tokens are on their way from the device: note them when the engine itself asks for them, on whichever
        thread that is. They travel with a later step."""
        native = output.get_output

        def get_output() -> Any:
            result = native()
            try:
                self._arrived.append((positions, sampled_tokens(result)))
            except Exception as error:
                self.report(f"get_output: {type(error).__name__}: {error}")
            return result

        output.get_output = get_output

    def _take_arrived(self) -> None:
        """Tokens of several steps, those of a request at once: what each costs is most of it a call's own cost."""
        runs: dict[str, tuple[int, list[int]]] = {}
        while self._arrived:
            positions, tokens = self._arrived.popleft()
            for request_id, token_ids in tokens.items():
                first, known = positions[request_id] + 1, runs.get(request_id)
                if known is not None and known[0] + len(known[1]) == first:
                    known[1].extend(token_ids)
                    continue
                if known is not None:
                    self._table.add_tokens(request_id, *known)
                runs[request_id] = first, token_ids
        for request_id, run in runs.items():
            self._table.add_tokens(request_id, *run)

    def invalidate(self) -> None:
        """The KV cache may change as a whole: wait until no search reads it, and let no older row pass."""
        if self._estimator is not None and not self._estimator.drain(timeout=10.0):
            self.fail("the estimator did not finish before the KV cache was replaced")
        self._generations.mark_all()

    def close(self) -> None:
        """Submit what is left, with the final counts."""
        self._take_arrived()
        if self._estimator is not None:
            self._estimator.submit(self._job(self.steps, time.time_ns(), None, None))

    def _mark_rewritten(self, step: ScheduledStep) -> None:
        self._generations.next_step()
        self._generations.mark(step.rewritten_blocks)
        for request in step.requests:
            if request.rewritten_blocks:
                self._generations.mark(request.rewritten_blocks)
        if self._connector:
            self._mark_given_back(step)

    def _mark_given_back(self, step: ScheduledStep) -> None:
        """A connector may fill the blocks of a request that ended for another one, of which no step tells before they
        are full (v1/core/sched/scheduler.py, `WAITING_FOR_REMOTE_KVS`)."""
        for request_id in (*step.finished, *step.preempted):
            self._generations.mark(self._blocks_of.pop(request_id, []))
        for request in step.requests:
            if request.fresh:
                self._blocks_of[request.request_id] = []
            held = self._blocks_of.setdefault(request.request_id, [])
            held += [block for group in request.block_ids for block in group]

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

    def _count_and_sample(self, labels: list[RowLabel], drafts: Drafts) -> list[RowLabel]:
        """Count every row of the step once; return those to be searched."""
        count(self._ledger, labels, "expected", "", self._heads)
        sampled = []
        settled: dict[Fate, list[RowLabel]] = {}
        for label in labels:
            fate = self._fate(label)
            if fate is None:
                sampled.append(label)
            else:
                settled.setdefault(fate, []).append(label)
        for fate, rows in settled.items():
            self._settle(rows, fate, drafts)
        return sampled

    def _fate(self, label: RowLabel) -> Fate | None:
        """Why a row is not searched; None if it is."""
        if label.refused_reason:
            return "refused", label.refused_reason
        if self.paused:
            return "refused", PAUSED
        if not label.sampled:
            return ("governed" if label.governed else "sampled_out"), ""
        return ("refused", CAPTURE_OFF) if self._ledger.fault else None

    def _settle(self, labels: list[RowLabel], fate: Fate, drafts: Drafts) -> None:
        count(self._ledger, labels, *fate, self._heads)
        if drafts.rows:
            drafts.fates |= {label: fate for label in labels if label.request_id in drafts.rows}

    def _drop(self, sampled: list[RowLabel], reason: str, drafts: Drafts) -> None:
        self._settle(sampled, ("dropped", reason), drafts)

    def _acquire(self, sampled: list[RowLabel], drafts: Drafts) -> StepSlot | None:
        if not sampled or not self._slots:
            return None
        try:
            slot = self._free.popleft()
        except IndexError:
            self._drop(sampled, ESTIMATOR_BUSY, drafts)
            return None
        slot.open()
        return slot

    def _submit(self, current: _CurrentStep) -> None:
        assert self._estimator is not None
        behind = self._estimator.backlog > MAX_BACKLOG
        if behind:
            self.fail(f"the estimator is {MAX_BACKLOG} steps behind")
        self._current = None
        # A rank without slots, which watches no layer, may be the one that samples: its tokens wait for no row.
        if current.slot is None and self._slots and not self._started and not self._finished:
            return
        self._take_arrived()
        rows = {label.request_id for label in current.sampled} if current.slot is not None else set()
        job = self._job(current.number, current.forward_end_ns, current.slot, rows)
        # What nobody works on must not pile up.
        if not behind:
            self._estimator.submit(job)

    def _job(self, step: int, wall_time_ns: int, slot: StepSlot | None, rows: set[str] | None) -> Job:
        self._ledger.hook_seconds = self.governor.hook_seconds
        self._ledger.device_waits = self._device.waits
        self._ledger.stride = 0 if self.paused or self._ledger.fault else self._table.stride
        self._ledger.queues = [QueueState("estimator", self._slots - len(self._free), self._slots)]
        job = Job(
            step,
            wall_time_ns,
            snapshot(self._ledger),
            slot,
            self._started,
            self._tokens + self._table.take_tokens(rows),
            self._finished,
        )
        self._started, self._tokens, self._finished = [], [], []
        return job
