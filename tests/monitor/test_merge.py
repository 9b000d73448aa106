"""In which order steps leave the merger, and when it stops waiting."""

from stream_monitor.monitor import merge
from stream_monitor.monitor.merge import MergedStep, Merger, Part
from stream_monitor.monitor.ranks import Rank, key_of
from stream_monitor.v1alpha1 import summary_pb2
from tests.monitor.synthetic import engine

INSTANCE = engine().instance


def rank(tensor: int, pipeline: int = 0, tensor_size: int = 2, pipeline_size: int = 1) -> Rank:
    info = engine(
        INSTANCE,
        tensor_parallel_rank=tensor,
        tensor_parallel_size=tensor_size,
        pipeline_parallel_rank=pipeline,
        pipeline_parallel_size=pipeline_size,
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


def test_the_deadline_and_the_memory_limit_end_the_wait(monkeypatch) -> None:
    merger, one = Merger(1.0), rank(0)
    merger.add(part(one, 1, arrived=5.0))
    assert merger.flush(5.9) == []
    assert left(merger.flush(6.0)) == [(1, 1, ("tp1",))]
    monkeypatch.setattr(merge, "MAX_WAITING_BYTES", 100)
    assert merger.add(part(one, 2, 6.0, 60)) == []
    assert left(merger.add(part(one, 3, 6.0, 60))) == [(2, 1, ("tp1",))]


def test_names_of_missing_ranks() -> None:
    merger = Merger(0.0)
    assert left(merger.add(part(rank(0, 1, 1, 2), 1))) == [(1, 1, ("pp0",))]
    merger = Merger(0.0)
    assert left(merger.add(part(rank(0, 1, 2, 2), 1))) == [(1, 1, ("tp0pp0", "tp1pp0", "tp1pp1"))]


def test_nothing_is_kept_of_engines_that_fell_silent() -> None:
    merger = Merger(0.0)
    merger.add(part(rank(0), 1))
    merger.flush(9.0)
    assert merger._engines == {}
