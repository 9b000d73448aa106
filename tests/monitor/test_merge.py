"""In which order steps leave the merger, and when it stops waiting."""

from typing import Any

import numpy as np

from stream_monitor.monitor import merge
from stream_monitor.monitor.merge import MergedStep, Merger, Part
from stream_monitor.monitor.ranks import Rank, key_of
from stream_monitor.monitor.rows import Row
from stream_monitor.v1alpha1 import summary_pb2
from tests.monitor.synthetic import engine

INSTANCE = engine().instance


def rank(
    tensor: int, pipeline: int = 0, tensor_size: int = 2, pipeline_size: int = 1, instance: str = INSTANCE, **more: Any
) -> Rank:
    info = engine(
        instance,
        tensor_parallel_rank=tensor,
        tensor_parallel_size=tensor_size,
        pipeline_parallel_rank=pipeline,
        pipeline_parallel_size=pipeline_size,
        **more,
    )
    return Rank(key_of(info), info, ("tiny", "0"))


def part(of: Rank, step: int, arrived: float = 0.0, size: int = 1) -> Part:
    return Part(of, summary_pb2.StepSummary(step=step), [], arrived, size)


def left(steps: list[MergedStep]) -> list[tuple[int, int, tuple[str, ...]]]:
    """Step, parts, what is missing."""
    return [(step.parts[0].summary.step, len(step.parts), step.missing) for step in steps]


def test_a_step_leaves_when_all_ranks_have_sent_it() -> None:
    merger, one, two = Merger(1.0), rank(0), rank(1)
    assert merger.add(part(one, 1)) == []
    assert left(merger.add(part(two, 1))) == [(1, 2, ())]


def test_messages_without_rows_keep_their_place() -> None:
    merger, one, two = Merger(1.0), rank(0), rank(1)
    assert left(merger.add(part(one, 0))) == [(0, 1, ())]
    merger.add(part(one, 1))
    assert merger.add(part(one, 0)) == []
    steps = merger.add(part(two, 1))
    assert [step.parts[0].summary.step for step in steps] == [1, 0]


def test_a_rank_that_went_past_a_step_is_not_waited_for() -> None:
    merger, one, two = Merger(1.0), rank(0), rank(1)
    merger.add(part(one, 1))
    merger.add(part(one, 2))
    assert left(merger.add(part(two, 2))) == [(1, 1, ("tp1",)), (2, 2, ())]


def test_the_deadline_ends_the_wait_for_an_absent_rank_once() -> None:
    merger, one, two = Merger(1.0), rank(0), rank(1)
    merger.add(part(one, 1, arrived=5.0))
    assert merger.flush(5.9) == []
    assert left(merger.flush(6.0)) == [(1, 1, ("tp1",))]
    assert left(merger.add(part(one, 2, 6.1))) == [(2, 1, ("tp1",))]
    late = merger.add(part(two, 2, 6.2))
    assert left(late) == [(2, 1, ())]
    assert late[0].late
    assert left(merger.add(part(one, 3, 6.3))) == [(3, 1, ("tp1",))], "it has not caught up"
    merger.add(part(two, 4, 6.4))
    assert merger.flush(7.3) == [], "it has caught up, so step 4 waits for the first rank"


def test_the_memory_limits_end_the_wait(monkeypatch) -> None:
    merger, one, other = Merger(1.0), rank(0), rank(0, instance=engine().instance)
    monkeypatch.setattr(merge, "MAX_WAITING_BYTES", 100)
    assert merger.add(part(one, 2, 6.0, 60)) == []
    assert left(merger.add(part(one, 3, 6.0, 60))) == [(2, 1, ("tp1",))]
    monkeypatch.setattr(merge, "MAX_ALL_WAITING_BYTES", 100)
    assert left(merger.add(part(other, 7, 6.0, 50))) == [(7, 1, ("tp1",))]


def test_a_rank_that_says_it_is_faulty_is_not_waited_for_and_is_missing() -> None:
    merger, one, two = Merger(1.0), rank(0), rank(1)
    broken = part(two, 0)
    broken.summary.ledger.fault = "a fault"
    merger.add(broken)
    assert left(merger.add(part(one, 1))) == [(1, 1, ("tp1",))]


def test_a_pipeline_rank_that_watches_nothing_is_neither_waited_for_nor_missing() -> None:
    merger, one, two = Merger(1.0), rank(0, 0, 1, 2, layers=()), rank(0, 1, 1, 2)
    merger.add(part(one, 0))
    assert left(merger.add(part(two, 1))) == [(1, 1, ())]


def row(of: Rank, request: str) -> Row:
    keys, mass = np.array([0], np.uint32), np.array([1.0], np.float32)
    return Row(request, 5, 0, True, keys, mass, 0.0, of.heads, ((of, of.heads),))


def test_a_request_whose_row_one_rank_lacks_is_told_with_the_rank() -> None:
    merger, one, two = Merger(1.0), rank(0), rank(1)
    merger.add(Part(one, summary_pb2.StepSummary(step=1), [row(one, "a"), row(one, "b")], 0.0, 1))
    (step,) = merger.add(Part(two, summary_pb2.StepSummary(step=1), [row(two, "b")], 0.0, 1))
    assert (step.missing, step.missing_of) == ((), {"a": {"tp1"}})
    assert [(each.request_id, each.heads) for each in step.rows] == [("a", one.heads), ("b", one.heads + two.heads)]


def of_step(of: Rank, *requests: str, more: bool = False) -> Part:
    """A message of a step that has several."""
    summary = summary_pb2.StepSummary(step=1, more=more)
    return Part(of, summary, [row(of, request) for request in requests], 0.0, 1)


def test_a_step_of_several_messages_leaves_with_all_of_them() -> None:
    merger, one, two = Merger(1.0), rank(0), rank(1)
    assert merger.add(of_step(one, "a", "b", more=True)) == []
    assert merger.add(of_step(two, "a", more=True)) == [], "the ranks need not be cut at the same place"
    assert merger.add(of_step(one, "c")) == []
    assert merger.add(of_step(two, "b", more=True)) == []
    (step,) = merger.add(of_step(two, "c"))
    assert ([each.rank for each in step.parts], step.missing, step.missing_of) == ([one, one, two, two, two], (), {})
    assert [(each.request_id, each.heads) for each in step.rows] == [(name, one.heads + two.heads) for name in "abc"]
    assert left(merger.add(part(one, 2))) == left(merger.flush(0.5)) == []


def test_a_step_whose_last_message_was_lost_is_not_waited_for_once_its_rank_is_past_it() -> None:
    merger, one, two = Merger(1.0), rank(0), rank(1)
    merger.add(of_step(one, "a", more=True))
    assert merger.add(of_step(two, "a", "b")) == []
    (step,) = merger.add(part(one, 2))
    assert step.missing_of == {"b": {"tp0"}}


def test_the_order_of_arrival_does_not_matter() -> None:
    merger, one, two = Merger(1.0), rank(0), rank(1)
    merger.add(part(two, 1))
    (step,) = merger.add(part(one, 1))
    assert [each.rank for each in step.parts] == [one, two]


def test_names_of_missing_ranks() -> None:
    merger = Merger(0.0)
    assert left(merger.add(part(rank(0, 1, 1, 2), 1))) == [(1, 1, ("pp0",))]
    merger = Merger(0.0)
    assert left(merger.add(part(rank(0, 1, 2, 2), 1))) == [(1, 1, ("tp0pp0", "tp1pp0", "tp1pp1"))]


def test_nothing_is_kept_of_engines_that_fell_silent() -> None:
    merger = Merger(0.0)
    merger.add(part(rank(0), 1))
    merger.flush(9.0)
    merger.flush(merge.FORGET_SECONDS)
    assert merger._engines == {}
