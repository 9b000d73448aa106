"""The runner-thread side with a stand-in runner and estimator: faults never reach the engine, and rows always add up.

The real engine does the same in tests/e2e.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.capture import MAX_BACKLOG, Capture
from stream_monitor.engine.compat.runner_v1 import RunnerV1
from stream_monitor.engine.cpu.slots import CpuSlot, LayerTap
from stream_monitor.engine.governor import Governor
from stream_monitor.engine.hooks import install_runner_hooks, install_worker_hooks
from stream_monitor.engine.requests import MOST_WAITING, RequestTable
from stream_monitor.records import RowLedger

HEADS, WATCHED = 2, 6


class Runner:
    """One request with a 4-token prompt that decodes for ever; `taps` see every forward pass."""

    def __init__(self, taps: list[LayerTap]) -> None:
        self.taps = taps
        table = SimpleNamespace(block_table=SimpleNamespace(np=np.full((4, 8), 5, np.int32)), block_size=16)
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[group])
        self.input_batch = SimpleNamespace(req_ids=["a"], block_table=SimpleNamespace(block_tables=[table]))
        self.broken_layer: int | None = None
        self.sampled: list[int] | None = [7]

    def execute_model(self, output):
        for layer, tap in enumerate(self.taps):
            if layer != self.broken_layer:
                tokens = output.total_num_scheduled_tokens
                rows = torch.arange(tokens).float().view(-1, 1, 1).expand(tokens, HEADS, 4)
                tap.take(rows, torch.tensor([0, tokens], dtype=torch.int32))

    def sample_tokens(self, grammar):
        return SimpleNamespace(req_ids=["a"], sampled_token_ids=None if self.sampled is None else [self.sampled])


class Estimator:
    """Keeps what it is given and lets go of the slot at once, or never."""

    shares_cpus, processor_seconds = False, 0.0

    def __init__(self, capture: Capture, frees: bool = True) -> None:
        self.jobs, self.backlog, self._capture, self._frees = [], 0, capture, frees

    def submit(self, job) -> None:
        self.jobs.append(job)
        if job.slot is not None and self._frees:
            self._capture.release(job.slot)

    def step_begun(self) -> None:
        pass

    def drain(self, timeout: float) -> bool:
        return True


def step(number: int):
    """SchedulerOutput of step `number`, from 0: the prompt, then one token each."""
    new = SimpleNamespace(
        req_id="a",
        prompt_token_ids=[1, 2, 3, 4],
        sampling_params=SimpleNamespace(extra_args=None),
        num_computed_tokens=0,
        block_ids=([5],),
    )
    cached = SimpleNamespace(
        req_ids=[], num_computed_tokens=[], num_output_tokens=[], new_block_ids=[], resumed_req_ids=set()
    )
    if number:
        cached = SimpleNamespace(
            req_ids=["a"],
            num_computed_tokens=[3 + number],
            num_output_tokens=[number],
            new_block_ids=[None],
            resumed_req_ids=set(),
        )
    tokens = 1 if number else 4
    return SimpleNamespace(
        scheduled_new_reqs=[] if number else [new],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={"a": tokens},
        total_num_scheduled_tokens=tokens,
        finished_req_ids=set(),
        preempted_req_ids=None,
        new_block_ids_to_zero=None,
        kv_cache_block_copies=None,
        scheduled_spec_decode_tokens={},
    )


class Device:
    """Slots over the taps, and no search."""

    search = None
    waits = 0

    def __init__(self, taps: list[LayerTap], slots: int, decode_query_len: int) -> None:
        self.taps = taps
        rows = 4 * decode_query_len
        self.slots = [CpuSlot(taps, rows, HEADS, 4, [8], torch.float32, decode_query_len) for _ in range(slots)]

    def follow(self, step) -> None:
        pass

    def take_tap_ns(self) -> int:
        return 0

    def stop(self) -> None:
        for tap in self.taps:
            tap.slot = None


class Rig:
    """A capture over the stand-ins, driven as a worker drives its runner."""

    def __init__(
        self,
        slots: int = 1,
        frees: bool = True,
        max_overhead: float = 0.0,
        decode_query_len: int = 1,
        stride: int = 1,
        connector: bool = False,
    ) -> None:
        taps = [LayerTap(0), LayerTap(1)]
        self.runner = Runner(taps)
        self.generations = BlockGenerations(16)
        self.capture = Capture(
            RunnerV1(self.runner),
            connector,
            Device(taps, slots, decode_query_len),
            RequestTable(stride, 8, False, np.zeros(10, np.uint8), None, False),
            self.generations,
            WATCHED,
            Governor(max_overhead),
        )
        self.estimator = Estimator(self.capture, frees)
        install_runner_hooks(self.runner, self.capture)

    def arm(self) -> "Rig":
        self.capture.arm(self.estimator)
        return self

    def run(self, steps: int, first: int = 0) -> None:
        for number in range(first, first + steps):
            self.runner.execute_model(step(number))
            assert self.runner.sample_tokens(None).sampled_token_ids == [[7]]

    @property
    def rows(self) -> RowLedger:
        return self.capture.ledger.token_rows


def test_rows_reach_the_estimator_with_their_owner_and_place():
    rig = Rig().arm()
    rig.run(3)
    assert [[(label.request_id, label.position) for label in job.slot.labels] for job in rig.estimator.jobs][-1] == [
        ("a", 5)
    ]
    assert [job.step for job in rig.estimator.jobs] == [1, 2, 3]
    assert rig.estimator.jobs[0].started[0].request_id == "a"
    assert [(run.first_position, len(run.flags)) for job in rig.estimator.jobs for run in job.tokens] == [
        (4, 1),
        (5, 1),
        (6, 1),
    ]
    assert rig.rows.expected == 3 * WATCHED


def test_tokens_of_steps_without_rows_travel_with_the_next_row_as_one_run():
    rig = Rig(stride=4).arm()
    rig.run(9)
    runs = [(run.first_position, len(run.flags)) for job in rig.estimator.jobs for run in job.tokens]
    assert runs == [(4, 1), (5, 3), (8, 4)]  # rows of steps 1, 4 and 8


def test_tokens_do_not_pile_up_where_no_row_is_captured():
    rig = Rig().arm()
    rig.run(1)
    rig.capture.paused = True
    rig.run(100, first=1)
    assert len(rig.capture._arrived) <= MOST_WAITING
    rig.capture.paused = False
    rig.run(1, first=101)
    runs = [(run.first_position, len(run.flags)) for job in rig.estimator.jobs for run in job.tokens]
    assert runs == [(4, 1), (5, 101)]


def verifying(number: int, drafts: int):
    """SchedulerOutput of step `number`, from 1, in which each decoded token so far brought `drafts` more to verify."""
    output = step(number)
    output.num_scheduled_tokens = {"a": 1 + drafts}
    output.total_num_scheduled_tokens = 1 + drafts
    output.scheduled_spec_decode_tokens = {"a": [9] * drafts}
    return output


def test_rows_of_rejected_drafts_are_neither_searched_nor_counted():
    rig = Rig(decode_query_len=4).arm()
    rig.run(1)
    rig.runner.sampled = [7, 7]  # one of three drafts was right
    rig.runner.execute_model(verifying(1, drafts=3))
    rig.runner.sample_tokens(None)
    slot = rig.estimator.jobs[-1].slot
    assert [(label.position, label.after) for label in slot.labels] == [(4, 3), (5, 2)]
    # The batch's last four query rows hold 0, 1, 2, 3.
    assert slot.queries[0, slot.batch_rows[:2], 0, 0].tolist() == [0, 1]
    assert slot.contexts[:2].tolist() == [5, 6]
    assert rig.rows.expected == 3 * WATCHED
    assert rig.estimator.jobs[-1].tokens[-1].first_position == 5


def test_a_stride_picks_accepted_drafts_by_their_position():
    rig = Rig(decode_query_len=4, stride=2).arm()
    rig.run(1)
    rig.runner.sampled = [7, 7, 7]
    rig.runner.execute_model(verifying(1, drafts=3))
    rig.runner.sample_tokens(None)
    assert [label.position for label in rig.estimator.jobs[-1].slot.labels] == [4, 6]
    assert (rig.rows.expected, rig.rows.sampled_out) == (4 * WATCHED, 1 * WATCHED)


def test_a_step_whose_sampled_rows_were_all_rejected_sends_none():
    rig = Rig(decode_query_len=4, stride=4).arm()
    rig.run(1)
    rig.runner.sampled = [7]
    jobs, free = len(rig.estimator.jobs), len(rig.capture._free)
    rig.runner.execute_model(verifying(1, drafts=3))
    rig.runner.sample_tokens(None)
    assert len(rig.estimator.jobs) == jobs
    assert len(rig.capture._free) == free
    assert (rig.rows.expected, rig.rows.sampled_out) == (2 * WATCHED, 1 * WATCHED)


def test_drafts_dropped_for_a_busy_estimator_count_when_they_were_accepted():
    rig = Rig(slots=1, frees=False, decode_query_len=4).arm()
    rig.run(1)
    rig.runner.sampled = [7, 7]
    rig.runner.execute_model(verifying(1, drafts=3))
    rig.runner.sample_tokens(None)
    assert rig.rows.expected == 3 * WATCHED
    assert rig.rows.dropped == {"estimator_busy": 2 * WATCHED}


def test_a_rank_that_is_not_told_what_was_accepted_ends_capture():
    rig = Rig(decode_query_len=4).arm()
    rig.run(1)
    rig.runner.sampled = None
    rig.runner.execute_model(verifying(1, drafts=3))
    rig.runner.sample_tokens(None)
    assert "which draft tokens were accepted is not known" in rig.capture.fault
    assert rig.rows.dropped == {"fault": 4 * WATCHED}


def test_nothing_happens_before_it_is_armed():
    rig = Rig()
    rig.run(2)
    assert rig.estimator.jobs == []
    assert rig.rows.expected == 0


def test_a_busy_estimator_costs_rows_and_no_waiting():
    rig = Rig(slots=2, frees=False).arm()
    rig.run(5)
    assert rig.rows.dropped == {"estimator_busy": 3 * WATCHED}
    waiting = [(queue.name, queue.size, queue.capacity) for job in rig.estimator.jobs for queue in job.ledger.queues]
    assert waiting == [("estimator", 1, 2), ("estimator", 2, 2)]
    assert rig.rows.expected == 5 * WATCHED


def test_a_layer_that_leaves_no_rows_ends_capture_and_not_decoding():
    rig = Rig().arm()
    rig.runner.broken_layer = 1
    rig.run(3)
    assert "watched layer 1 left 0 query rows" in rig.capture.fault
    assert rig.rows.dropped == {"fault": WATCHED}
    assert rig.rows.refused == {"capture_off": 2 * WATCHED}
    assert rig.rows.expected == 3 * WATCHED


@pytest.mark.parametrize("part", ["before_step", "after_forward", "after_sampling"])
def test_an_exception_anywhere_ends_capture_and_not_decoding(part, monkeypatch):
    rig = Rig().arm()
    rig.run(1)

    def broken(*args):
        raise RuntimeError("boom")

    monkeypatch.setattr(rig.capture, part, broken)
    rig.runner = Runner(rig.runner.taps)
    install_runner_hooks(rig.runner, rig.capture)
    rig.run(3, first=1)
    assert "RuntimeError: boom" in rig.capture.fault


def test_a_tap_that_cannot_copy_ends_capture_and_not_decoding():
    rig = Rig().arm()
    rig.run(1)
    rig.runner.taps[0]._layer = 9  # the slot has two
    rig.run(2, first=1)
    assert "query rows of watched layer 9 could not be copied" in rig.capture.fault
    assert rig.rows.expected == 3 * WATCHED


def test_a_fault_of_the_estimator_thread_is_acted_on_at_the_next_step():
    rig = Rig().arm()
    rig.run(1)
    rig.capture.report("estimator: ValueError: x")
    assert rig.capture.fault == ""
    rig.run(1, first=1)
    assert rig.capture.fault == "estimator: ValueError: x"
    assert rig.rows.refused == {"capture_off": WATCHED}


def test_blocks_are_marked_before_the_step_that_may_rewrite_them():
    rig = Rig().arm()
    rig.run(1)
    assert rig.generations.of_block[5] == 1
    assert rig.generations.of_block[4] == 0
    rig.run(1, first=1)
    assert rig.generations.of_block[5] == 1, "a decode step writes behind the row, into no new block"


def test_replacing_the_cache_invalidates_every_older_row():
    rig = Rig().arm()
    rig.run(1)
    seen = []
    worker = SimpleNamespace(reload_weights=lambda path: seen.append("reload") or path)
    install_worker_hooks(worker, rig.capture, lambda: seen.append("replaced"))
    assert worker.reload_weights(2) == 2
    assert seen == ["reload", "replaced"]
    taken = rig.estimator.jobs[-1].slot.generations[0]
    assert (rig.generations.of_block > taken).all()


@pytest.mark.parametrize(
    ("call", "there"),
    [
        (("sleep", 1), False),
        (("discard", ("weights",)), False),
        (("wake_up", ["kv_cache"]), False),
        (("wake_up", ["weights"]), True),
        (("wake_up",), True),
        (("update_weights", {}), True),
        (("finish_weight_update",), True),
        (("reset_weights",), True),
    ],
)
def test_weights_are_read_again_only_while_their_memory_is_there(call, there):
    rig = Rig().arm()
    rig.run(1)
    seen = []
    name, *arguments = call
    worker = SimpleNamespace(**{name: lambda tags=None: None})
    install_worker_hooks(worker, rig.capture, lambda: seen.append("replaced"))
    getattr(worker, name)(*arguments)
    assert seen == ["replaced"] * there
    assert (rig.generations.of_block == rig.generations.now).all()


def test_a_fault_goes_to_the_monitor_at_once():
    rig = Rig().arm()
    rig.run(2)
    rig.runner.broken_layer = 1
    rig.run(1, first=2)
    told = rig.estimator.jobs[-1]
    assert (told.slot, told.ledger.fault) == (None, rig.capture.fault)
    assert told.ledger.token_rows.dropped == {"fault": WATCHED}
    count = len(rig.estimator.jobs)
    rig.run(3, first=3)
    assert len(rig.estimator.jobs) == count, "once"


def test_also_one_that_keeps_every_step_from_being_read(monkeypatch):
    rig = Rig().arm()
    monkeypatch.setattr(rig.capture._table, "rows", lambda request: 1 / 0)
    rig.run(3)
    assert [job.ledger.fault for job in rig.estimator.jobs] == [rig.capture.fault]
    monkeypatch.undo()
    other = Rig().arm()
    monkeypatch.setattr(other.capture, "_job", lambda *_: 1 / 0)
    other.capture.fail("x")
    assert other.capture.fault == "x", "and one that keeps it from being told reaches nobody"


def test_steps_do_not_pile_up_behind_a_search_that_hangs():
    rig = Rig().arm()
    rig.run(1)
    rig.estimator.backlog = MAX_BACKLOG + 1
    before = len(rig.estimator.jobs)
    rig.run(1, first=1)
    assert "steps behind" in rig.capture.fault
    assert rig.rows.dropped == {"fault": WATCHED}
    for number in range(40):
        rig.runner.execute_model(step(0))
        rig.runner.sample_tokens(None)
        assert len(rig.estimator.jobs) == before + 1, number
    assert len(rig.capture._started) <= 1


@pytest.mark.parametrize("how", ["finished_req_ids", "preempted_req_ids"])
def test_what_a_request_gives_back_may_be_filled_by_a_connector_at_once(how):
    rig = Rig(connector=True).arm()
    rig.run(2)
    without = step(2)
    without.scheduled_cached_reqs, without.num_scheduled_tokens = step(0).scheduled_cached_reqs, {}
    setattr(without, how, {"a"})
    rig.capture.before_step(without)
    assert rig.generations.of_block[5] == rig.generations.now == 3
    assert rig.capture._blocks_of == {}


def test_a_dummy_run_is_not_looked_at():
    rig = Rig().arm()
    native = SimpleNamespace(execute_model=lambda output, dummy_run=False: "ran", sample_tokens=lambda grammar: None)
    install_runner_hooks(native, rig.capture)
    assert native.execute_model(None, dummy_run=True) == "ran"
    assert rig.capture.fault == ""


def test_a_pause_refuses_rows_and_follows_requests_on():
    rig = Rig().arm()
    rig.run(2)
    rig.capture.paused = True
    rig.run(3, first=2)
    assert rig.rows.refused == {"paused": 3 * WATCHED}
    rig.capture.paused = False
    rig.run(1, first=5)
    assert rig.estimator.jobs[-1].slot.labels[0].position == 8, "and knows where they are when it goes on"
    assert rig.rows.expected == 6 * WATCHED
    assert rig.estimator.jobs[-1].ledger.stride == 1


def test_a_cost_above_the_bound_raises_the_stride_and_counts_what_that_leaves_out():
    rig = Rig(max_overhead=1e-9).arm()
    rig.run(140)
    assert rig.capture.governor.factor == 2
    searched = sum(len(job.slot.labels) for job in rig.estimator.jobs if job.slot)
    assert rig.rows.governed == rig.rows.expected - searched * WATCHED == 6 * WATCHED
    assert rig.rows.sampled_out == 0
    assert rig.estimator.jobs[-1].ledger.stride == 2
    assert rig.estimator.jobs[-1].ledger.hook_seconds > 0


@pytest.mark.parametrize(("shares", "factor"), [(True, 2), (False, 1)])
def test_what_the_search_takes_counts_where_it_has_no_cpu_of_its_own(shares, factor):
    rig = Rig(max_overhead=100.0).arm()
    rig.estimator.shares_cpus = shares
    rig.estimator.processor_seconds = 1e6
    rig.run(140)
    assert rig.capture.governor.factor == factor


def test_tokens_that_are_still_on_the_device_are_noted_when_the_engine_asks_for_them():
    rig = Rig().arm()
    pending = SimpleNamespace(get_output=lambda: SimpleNamespace(req_ids=["a"], sampled_token_ids=[[7]]))
    rig.runner.sample_tokens = None
    rig.capture.before_step(step(0))
    rig.runner.execute_model.__wrapped__(step(0))
    rig.capture.after_forward(True)
    rig.capture.after_sampling(pending)
    assert [run for job in rig.estimator.jobs for run in job.tokens] == []
    assert pending.get_output().sampled_token_ids == [[7]]
    rig.capture.before_step(step(1))
    rig.runner.execute_model.__wrapped__(step(1))
    rig.capture.after_forward(False)
    assert [(run.first_position, len(run.flags)) for job in rig.estimator.jobs for run in job.tokens] == [(4, 1)]


def test_a_row_with_another_request_s_blocks_ends_the_capture():
    rig = Rig().arm()
    rig.runner.input_batch.block_table.block_tables[0].block_table.np[0, 0] = 6
    rig.run(2)
    assert "block table is not that of the request" in rig.capture.fault
