"""The one extra thread of a worker: runs the search over a step's rows and writes the ring record.

It never holds the interpreter lock while it searches (one nogil call for all layers, rows and heads) and computes on a
CPU the engine does not use: new threads inherit the worker's pinned core (utils/ompmultiprocessing.py:96).
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from stream_kernels.cpu import ROW_INVALID, ROW_OK, ROW_RACED
from stream_monitor.engine.device import RowSearch, StepSlot
from stream_monitor.engine.ledger import count, merged
from stream_monitor.engine.packing import pack_rows
from stream_monitor.engine.requests import RowLabel
from stream_monitor.engine.splitting import split
from stream_monitor.engine.steps import Job
from stream_monitor.records import Audit, Ledger, Phase, Rows, StepRecord, encode
from stream_monitor.ring import RingWriter

log = logging.getLogger("vllm.stream_monitor")

STEP_SECONDS = 0.02
"""How long a search waits for the engine's next step, see `Estimator.step_begun`. After the last one there is none."""


class Estimator:
    """Owns the search, the ring's writing end and the counts of what became of submitted rows.

    Args:
        search: of the watched layers.
        heads_per_row: watched (layer, head) pairs, the ledger's unit.
        head_key_bytes: bytes of one key of one KV head.
        audit_every: recompute one (layer, row, head) exactly every so many searched steps; 0 never.
        cpus: CPUs to run on; empty leaves the affinity alone. Where it is a single one, the engine's core is on it too,
            and what it does between two steps is waited for by everybody: the search then waits for the next step.
        release: called with a slot once its content is not needed.
        on_fault: called with a reason when a step could not be worked on.
        after_job: called after each job; keeps the publisher alive.
    """

    def __init__(
        self,
        search: RowSearch,
        heads_per_row: int,
        head_key_bytes: int,
        ring: RingWriter,
        audit_every: int,
        cpus: set[int],
        release: Callable[[StepSlot], None],
        on_fault: Callable[[str], None],
        after_job: Callable[[], None],
    ) -> None:
        self._search = search
        self._heads = heads_per_row
        self._head_key_bytes = head_key_bytes
        self._ring = ring
        self._audit_every = audit_every
        self._cpus = cpus
        self._release = release
        self._on_fault = on_fault
        self._after_job = after_job
        self._ledger = Ledger()
        self._processor_seconds = 0.0
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._unfinished = 0
        self._given_up = False
        self._idle = threading.Condition()
        self._yields = len(cpus) == 1
        self._step_begun = threading.Event()
        self._random = np.random.default_rng(0)
        self._thread = threading.Thread(target=self._run, name="stream-monitor-estimator", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        # Compiled (or loaded) here: that holds the interpreter lock.
        pack_rows(self._search.summary, [], [])
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand over a step; returns at once."""
        self._step_begun.clear()
        with self._idle:
            self._unfinished += 1
        self._jobs.put(job)

    def step_begun(self) -> None:
        """The engine's next forward pass begins: its core has nothing to do but wait for it."""
        self._step_begun.set()

    @property
    def shares_cpus(self) -> bool:
        """Whether the search has no CPU that the engine does not use."""
        return not self._cpus

    @property
    def processor_seconds(self) -> float:
        """That all searches so far took. On a GPU the thread sleeps for most of a search."""
        return self._processor_seconds

    @property
    def ledger(self) -> Ledger:
        """What became of submitted rows; the estimator thread's, so that a reader may see a step half counted."""
        return self._ledger

    @property
    def backlog(self) -> int:
        """Jobs handed over and not yet done."""
        return self._unfinished

    def drain(self, timeout: float) -> bool:
        """Wait until nothing reads the KV cache; False if that takes longer than `timeout` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: self._unfinished == 0, timeout)

    def stop(self, timeout: float) -> None:
        """Finish what was handed over, then end the thread; what is not done after `timeout` seconds is given up, and
        the ring is not touched any more."""
        self._jobs.put(None)
        self._thread.join(timeout)
        self._given_up = self._thread.is_alive()

    def _run(self) -> None:
        if self._cpus:
            try:
                os.sched_setaffinity(0, self._cpus)
            except OSError as error:
                log.warning("Stream Monitor: estimator thread keeps the engine's CPUs %s: %s", self._cpus, error)
        while (job := self._jobs.get()) is not None and not self._given_up:
            try:
                # A thread that is behind has no time to lose.
                if self._yields and job.slot is not None and self._unfinished == 1:
                    self._step_begun.wait(STEP_SECONDS)
                self._work(job)
                self._after_job()
            except Exception as error:
                log.exception("Stream Monitor: estimator failed")
                self._on_fault(f"estimator: {type(error).__name__}: {error}")
            finally:
                with self._idle:
                    self._unfinished -= 1
                    self._idle.notify_all()

    def _work(self, job: Job) -> None:
        rows: Rows | None = None
        audits: list[Audit] = []
        if job.slot is not None:
            slot, labels = job.slot, job.slot.labels
            try:
                rows, audits = self._estimate(slot)
            except Exception:
                count(self._ledger, labels, "dropped", "estimator_error", self._heads)
                raise
            finally:
                self._release(slot)
        self._write(job, rows, audits)

    def _estimate(self, slot: StepSlot) -> tuple[Rows | None, list[Audit]]:
        """Search the slot's rows; those whose keys may have been rewritten meanwhile are counted `raced`, left out."""
        labels, rows = slot.labels, len(slot.labels)
        begin, busy = time.perf_counter(), time.thread_time()
        status = self._search.run(slot)
        self._ledger.estimate_seconds += time.perf_counter() - begin
        self._processor_seconds += time.thread_time() - busy
        self._ledger.estimates += 1
        summary = self._search.summary
        keys = summary.keys_read[:, :rows].sum(dtype=np.float64) * summary.unobserved_lse.shape[2]
        self._ledger.key_bytes += int(keys) * self._head_key_bytes
        raced = [labels[row] for row in range(rows) if status[row] == ROW_RACED]
        invalid = [labels[row] for row in range(rows) if status[row] == ROW_INVALID]
        count(self._ledger, raced, "raced", "", self._heads)
        count(self._ledger, invalid, "dropped", "invalid_row", self._heads)
        keep = [row for row in range(rows) if status[row] == ROW_OK]
        if not keep:
            return None, []
        packed = pack_rows(summary, labels, keep)
        return packed, self._audit(slot, keep)

    def _audit(self, slot: StepSlot, keep: list[int]) -> list[Audit]:
        """Every `audit_every` steps, judge one (layer, kept row, head) by exact attention."""
        if not self._audit_every or self._ledger.estimates % self._audit_every:
            return []
        layers, _, heads = self._search.summary.unobserved_lse.shape
        layer, index, head = (int(self._random.integers(size)) for size in (layers, len(keep), heads))
        found = self._search.audit(slot, layer, keep[index], head)
        # The row's index in the record, not in the slot; none where its blocks were reused since the search.
        return [] if found is None else [replace(found, row=index)]

    def _write(self, job: Job, rows: Rows | None, audits: list[Audit]) -> None:
        if self._given_up:
            return
        step = StepRecord(
            step=job.step if rows else 0,
            wall_time_ns=job.wall_time_ns,
            ledger=job.ledger,
            rows=rows,
            started=job.started,
            tokens=job.tokens,
            finished=job.finished,
            audits=audits,
        )
        for record in split(step):
            labels = _labels_of(record.rows)
            count(self._ledger, labels, "captured", "", self._heads)
            if self._put(record, job.ledger):
                continue
            count(self._ledger, labels, "captured", "", -self._heads)
            count(self._ledger, labels, "dropped", "record_too_large", self._heads)
            # Requests begin, go on and end all the same.
            rest = replace(record, step=0, rows=None, audits=[], more=False)
            if (rest.started or rest.tokens or rest.finished) and not self._put(rest, job.ledger):
                log.warning(
                    "Stream Monitor: what step %d says of requests is larger than the ring and lost; raise "
                    "STREAM_MONITOR_RING_BYTES",
                    job.step,
                )
                self._ring.skip()

    def _put(self, record: StepRecord, runner: Ledger) -> bool:
        """Write a record, with the sum of both ledgers; False if it is larger than the ring."""
        record.ledger = written = merged(runner, self._ledger)
        encoded = encode(record)
        fits = self._ring.write(encoded, written.token_rows.captured, written.chunk_rows.captured)
        if fits:
            self._ledger.record_bytes += len(encoded)
        return fits


def _labels_of(rows: Rows | None) -> list[RowLabel]:
    """Just enough of a label to count a packed row."""
    if rows is None:
        return []
    return [
        RowLabel(request_id, 0, 0, Phase(phase), "", True)
        for request_id, phase in zip(rows.request_ids, rows.phases, strict=True)
    ]
