"""Joins the ranks of an engine step: tensor-parallel ranks see other heads, pipeline ranks other layers.

Each rank's messages wait in its own queue. A step leaves when every rank has sent it, of a large one the last message,
or has gone past it, or when its deadline is over; what then lacks a rank is partial. Steps leave in ascending order,
and a message without rows leaves in its rank's order. A rank that let a deadline pass is not waited for again until it
has caught up, so that a dead one holds its engine up once and not in every step; what it sends of steps that left
without it leaves at once, as `late`.
With one rank everything passes straight through.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from stream_monitor.monitor.ranks import Labels, Rank, rank_name
from stream_monitor.monitor.rows import Row, discard
from stream_monitor.v1alpha1 import summary_pb2

MAX_WAITING_BYTES = 64 << 20
"""Messages an engine may have waiting here, by wire size; beyond it its oldest step leaves as it is."""
MAX_ALL_WAITING_BYTES = 256 << 20
"""The same of all engines together, at the cost of the one that sends."""
FORGET_SECONDS = 60.0
"""An engine that has nothing waiting and sends nothing for so long is forgotten."""

Place = tuple[int, int]
"""Pipeline rank and tensor rank."""
_NEVER = 1 << 63
"""In place of a rank's newest step: it sends no rows, so that no step waits for it."""


@dataclass(slots=True)
class Part:
    """One rank's message of one step, its rows already decoded. A large step has several (`StepSummary.more`)."""

    rank: Rank
    summary: summary_pb2.StepSummary
    rows: list[Row]
    arrived: float
    size: int


@dataclass(slots=True)
class MergedStep:
    """A step with the rows of all ranks that arrived.

    Attributes:
        parts: by pipeline rank, then tensor rank, then as they were sent.
        missing: names of the ranks that watch something and are not there.
        missing_of: request to the names of ranks that are there without a row of it that others have.
        late: the step left before, without this rank; its rows join those.
    """

    parts: list[Part]
    rows: list[Row]
    missing: tuple[str, ...] = ()
    missing_of: dict[str, set[str]] = field(default_factory=dict)
    late: bool = False

    @property
    def instance(self) -> str:
        """Of the engine whose step it is."""
        return self.parts[0].rank.engine.instance

    @property
    def more(self) -> bool:
        """Whether each of its ranks has more to send of this step."""
        return all(part.summary.more for part in self.parts)

    @property
    def entries(self) -> int:
        """Rows and notes of requests: it names no more requests than that."""
        told = (part.summary for part in self.parts)
        return len(self.rows) + sum(len(each.started) + len(each.tokens) + len(each.finished) for each in told)

    def leave_out(self, unwanted: Callable[[str], bool], reason: str) -> set[str]:
        """Take out what belongs to requests that are `unwanted`, by internal id; their rows are discarded for `reason`.

        Returns those of them that start here.
        """
        kept = []
        for row in self.rows:
            if unwanted(row.request_id):
                discard(row, reason)
            else:
                kept.append(row)
        self.rows = kept
        begun: set[str] = set()
        for part in self.parts:
            begun.update(entry.request_id for entry in part.summary.started if unwanted(entry.request_id))
            for entries in (part.summary.started, part.summary.tokens, part.summary.finished):
                for place in reversed(range(len(entries))):
                    if unwanted(entries[place].request_id):
                        del entries[place]
        return begun


@dataclass(slots=True)
class _Engine:
    """What waits of one engine core; `left` is the newest step that has gone on, `heard` when it last sent."""

    size: int
    ranks: dict[Place, deque[Part]] = field(default_factory=dict)
    newest: dict[Place, int] = field(default_factory=dict)
    absent: set[Place] = field(default_factory=set)
    bystanders: set[Place] = field(default_factory=set)
    waiting: int = 0
    left: int = 0
    heard: float = 0.0

    def hear(self, part: Part) -> None:
        """Note what a message says of its rank: how far it is, or that it will send no rows."""
        place = _place(part.rank)
        self.heard = part.arrived
        if part.summary.step > self.left:
            self.absent.discard(place)
        # What it has sent to the end.
        sent = part.summary.step - part.summary.more
        self.newest[place] = max(self.newest.get(place, 0), sent)
        if not part.rank.heads:
            self.bystanders.add(place)
            self.newest[place] = _NEVER
        elif part.summary.ledger.fault:
            self.newest[place] = _NEVER

    def awaits(self, step: int) -> bool:
        """Whether some rank may still send this step."""
        past = sum(newest >= step for newest in self.newest.values())
        gone = sum(self.newest.get(place, 0) < step for place in self.absent)
        return past + gone < self.size


class Merger:
    """Takes parts as they arrive, gives merged steps. `deadline` in seconds after a step's first part."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._engines: dict[tuple[str, int], _Engine] = {}
        self._waiting = 0

    def add(self, part: Part) -> list[MergedStep]:
        """Take in one part; return the steps that are ready."""
        info = part.rank.engine
        size = info.tensor_parallel_size * info.pipeline_parallel_size
        if size == 1:
            return [MergedStep([part], part.rows)]
        engine = self._engines.setdefault((info.instance, info.data_parallel_index), _Engine(size))
        engine.hear(part)
        queue = engine.ranks.setdefault(_place(part.rank), deque())
        if part.summary.step and part.summary.step <= engine.left:
            # Nothing of its rank can wait before it: those steps are older, and left as well.
            return [MergedStep([part], part.rows, late=True), *self._ready(engine, part.arrived)]
        queue.append(part)
        engine.waiting += part.size
        self._waiting += part.size
        return self._ready(engine, part.arrived)

    def flush(self, now: float) -> list[MergedStep]:
        """The steps whose deadline is over; forgets engines that fell silent."""
        ready = [step for engine in self._engines.values() for step in self._ready(engine, now)]
        self._engines = {
            key: engine
            for key, engine in self._engines.items()
            if engine.waiting or now - engine.heard < FORGET_SECONDS
        }
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
                    part = self._take(engine, queue)
                    ready.append(MergedStep([part], part.rows))
            heads = [queue[0] for queue in engine.ranks.values() if queue]
            if not heads:
                return ready
            step = min(part.summary.step for part in heads)
            arrived = min(part.arrived for part in heads if part.summary.step == step)
            due = now - arrived >= self.deadline
            full = engine.waiting > MAX_WAITING_BYTES or self._waiting > MAX_ALL_WAITING_BYTES
            if not due and not full and engine.awaits(step):
                return ready
            parts = []
            for queue in engine.ranks.values():
                while queue and queue[0].summary.step == step:
                    parts.append(self._take(engine, queue))
            merged = _merged(parts, engine.bystanders)
            engine.left = step
            if due and merged.missing:
                absent = _places(parts[0]) - {_place(part.rank) for part in parts}
                engine.absent |= {place for place in absent if engine.newest.get(place, 0) < step}
            ready.append(merged)

    def _take(self, engine: _Engine, queue: deque[Part]) -> Part:
        part = queue.popleft()
        engine.waiting -= part.size
        self._waiting -= part.size
        return part


def _place(rank: Rank) -> Place:
    return rank.engine.pipeline_parallel_rank, rank.engine.tensor_parallel_rank


def _places(part: Part) -> set[Place]:
    """Of all ranks of an engine core."""
    info = part.rank.engine
    return {
        (pipeline, tensor)
        for pipeline in range(info.pipeline_parallel_size)
        for tensor in range(info.tensor_parallel_size)
    }


def _merged(parts: list[Part], bystanders: set[Place]) -> MergedStep:
    """One step of these parts."""
    parts = sorted(parts, key=lambda part: _place(part.rank))
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
    present = {_place(part.rank) for part in parts}
    info = parts[0].rank.engine
    missing: list[Place] = []
    if len(present | bystanders) < info.tensor_parallel_size * info.pipeline_parallel_size:
        missing = sorted(_places(parts[0]) - present - bystanders)
    missing_of: dict[str, set[str]] = {}
    for row in rows.values():
        if len(row.sources) < len(present):
            there = {_place(rank) for rank, _ in row.sources}
            missing_of.setdefault(row.request_id, set()).update(_names(parts[0], present - there))
    return MergedStep(parts, [*rows.values(), *repeated], tuple(_names(parts[0], missing)), missing_of)


def _names(part: Part, places: Iterable[Place]) -> list[str]:
    return [rank_name(part.rank.engine, tensor, pipeline) for pipeline, tensor in places]
