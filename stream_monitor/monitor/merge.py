"""Joins the ranks of an engine step: tensor-parallel ranks see other heads, pipeline ranks other layers.

Each rank's messages wait in its own queue. A step leaves when every rank has sent it or has gone past it, or when
its deadline is over; what then lacks a rank is partial. Steps leave in ascending order, and a message without rows
leaves in its rank's order. With one rank everything passes straight through.
"""

from collections import deque
from dataclasses import dataclass, field

from stream_monitor.monitor.ranks import Labels, Rank, rank_name
from stream_monitor.monitor.rows import Row
from stream_monitor.v1alpha1 import summary_pb2

MAX_WAITING_BYTES = 64 << 20
"""Messages an engine may have waiting here, by wire size; beyond it the oldest step leaves as it is."""


@dataclass(slots=True)
class Part:
    """One rank's message of one step, its rows already decoded."""

    rank: Rank
    summary: summary_pb2.StepSummary
    rows: list[Row]
    arrived: float
    size: int


@dataclass(slots=True)
class MergedStep:
    """A step with the rows of all ranks that arrived."""

    parts: list[Part]
    rows: list[Row]
    missing: tuple[str, ...] = ()


@dataclass(slots=True)
class _Engine:
    ranks: dict[tuple[int, int], deque[Part]] = field(default_factory=dict)
    newest: dict[tuple[int, int], int] = field(default_factory=dict)
    waiting: int = 0


class Merger:
    """Takes parts as they arrive, gives merged steps. `deadline` in seconds after a step's first part."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._engines: dict[tuple[str, int], _Engine] = {}

    def add(self, part: Part) -> list[MergedStep]:
        """Take in one part; return the steps that are ready."""
        info = part.rank.engine
        if info.tensor_parallel_size * info.pipeline_parallel_size == 1:
            return [MergedStep([part], part.rows)]
        engine = self._engines.setdefault((info.instance, info.data_parallel_index), _Engine())
        place = (info.tensor_parallel_rank, info.pipeline_parallel_rank)
        engine.ranks.setdefault(place, deque()).append(part)
        engine.newest[place] = max(engine.newest.get(place, 0), part.summary.step)
        engine.waiting += part.size
        return self._ready(engine, part.arrived)

    def flush(self, now: float) -> list[MergedStep]:
        """The steps whose deadline is over; forgets engines with nothing waiting."""
        ready = [step for engine in self._engines.values() for step in self._ready(engine, now)]
        self._engines = {key: engine for key, engine in self._engines.items() if engine.waiting}
        return ready

    def waiting(self) -> dict[Labels, int]:
        """Bytes of messages that wait for other ranks: of the fullest engine of each label pair."""
        found: dict[Labels, int] = {}
        for engine in self._engines.values():
            part = next((queue[0] for queue in engine.ranks.values() if queue), None)
            if part is not None:
                found[part.rank.labels] = max(found.get(part.rank.labels, 0), engine.waiting)
        return found

    def _ready(self, engine: _Engine, now: float) -> list[MergedStep]:
        ready: list[MergedStep] = []
        while True:
            for queue in engine.ranks.values():
                while queue and not queue[0].summary.step:
                    part = queue.popleft()
                    engine.waiting -= part.size
                    ready.append(MergedStep([part], part.rows))
            heads = [queue[0] for queue in engine.ranks.values() if queue]
            if not heads:
                return ready
            step = min(part.summary.step for part in heads)
            parts = [part for part in heads if part.summary.step == step]
            due = now - min(part.arrived for part in parts) >= self.deadline
            if not due and engine.waiting <= MAX_WAITING_BYTES and self._awaited(engine, parts[0].rank, step):
                return ready
            for queue in engine.ranks.values():
                if queue and queue[0].summary.step == step:
                    engine.waiting -= queue.popleft().size
            ready.append(_merged(parts))

    def _awaited(self, engine: _Engine, rank: Rank, step: int) -> bool:
        """Whether some rank may still send this step."""
        size = rank.engine.tensor_parallel_size * rank.engine.pipeline_parallel_size
        return len(engine.newest) < size or any(newest < step for newest in engine.newest.values())


def _merged(parts: list[Part]) -> MergedStep:
    rows: dict[tuple[str, int, int], Row] = {}
    repeated: list[Row] = []
    for part in parts:
        for row in part.rows:
            key = (row.request_id, row.position, row.attempt)
            held = rows.get(key)
            if held and held.shares_source(row):
                repeated.append(row)
            else:
                rows[key] = held.joined(row) if held else row
    info = parts[0].rank.engine
    present = {(p.rank.engine.tensor_parallel_rank, p.rank.engine.pipeline_parallel_rank) for p in parts}
    missing = tuple(
        rank_name(info, tensor, pipeline)
        for pipeline in range(info.pipeline_parallel_size)
        for tensor in range(info.tensor_parallel_size)
        if (tensor, pipeline) not in present
    )
    return MergedStep(parts, [*rows.values(), *repeated], missing)
