"""Which engine ranks there are, what each has said last, and which of its rows were discarded here."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from stream_monitor.monitor.faults import Refusal, invalid
from stream_monitor.monitor.ledger import RankLedger, add_cells
from stream_monitor.monitor.validate import MAX_RANKS, check_engine
from stream_monitor.v1alpha1 import summary_pb2

RankKey = tuple[str, int, int, int]
"""Engine instance, data-parallel index, tensor-parallel rank, pipeline-parallel rank."""
Labels = tuple[str, str]
"""`model_name` and `engine`, as in vLLM's metrics."""

MAX_LABELS = 1024
"""Distinct label pairs ever exported; what comes later shares OTHER, so that no publisher can grow the export."""
OTHER: Labels = ("other", "other")
MAX_RETIRED = 65_536
"""Retired ranks whose return is still recognised."""


@dataclass(slots=True)
class Totals:
    """Cumulative counts of ranks, the rows apart: as in `summary.proto` Ledger, and messages that never arrived."""

    estimates: int = 0
    estimate_seconds: float = 0.0
    hook_seconds: float = 0.0
    device_waits: int = 0
    key_bytes: int = 0
    record_bytes: int = 0
    sent: int = 0
    lost_messages: int = 0
    arguments: Counter[str] = field(default_factory=Counter)

    def add(self, rank: "Rank") -> None:
        """Add what `rank` counted."""
        newest = rank.ledger.newest
        self.estimates += newest.estimates
        self.estimate_seconds += newest.estimate_seconds
        self.hook_seconds += newest.hook_seconds
        self.device_waits += newest.device_waits
        self.key_bytes += newest.key_bytes
        self.record_bytes += newest.record_bytes
        self.sent += newest.sent
        self.lost_messages += rank.lost_messages
        self.arguments.update(newest.refused_arguments)


def key_of(engine: summary_pb2.EngineInfo) -> RankKey:
    """The key of the rank that sent this."""
    return (
        engine.instance,
        engine.data_parallel_index,
        engine.tensor_parallel_rank,
        engine.pipeline_parallel_rank,
    )


@dataclass(slots=True, eq=False)
class Rank:
    """One engine rank: constant description, newest sequence and ledger, open streams, when the last one ended."""

    key: RankKey
    engine: summary_pb2.EngineInfo
    labels: Labels
    sequence: int = 0
    streams: int = 0
    left_at: float = 0.0
    lost_messages: int = 0
    recent_messages: int = 0
    """Since the last look at the rate."""
    publishes_for: str = ""
    """The tenant that its publisher's credential is of; empty: the engine says."""
    ledger: RankLedger = field(default_factory=RankLedger)

    @property
    def heads(self) -> int:
        """Watched (layer, query head) pairs: what one row counts in the ledger."""
        return len(self.engine.layers) * len(self.engine.query_heads)

    def tenant_of(self, said: str) -> str:
        """Whose a request is of which the engine says `said`."""
        return self.publishes_for or said or self.engine.tenant

    @property
    def tenant_unheard(self) -> str:
        """Whose a request is of which the start was not seen, as the monitor was started since."""
        return self.publishes_for or ("" if self.engine.tenants_by_request else self.engine.tenant)


def rank_name(engine: summary_pb2.EngineInfo, tensor: int, pipeline: int) -> str:
    """Name of one place in an engine; an axis of size 1 is left out."""
    parts = []
    if engine.tensor_parallel_size > 1 or engine.pipeline_parallel_size == 1:
        parts.append(f"tp{tensor}")
    if engine.pipeline_parallel_size > 1:
        parts.append(f"pp{pipeline}")
    return "".join(parts)


class RankBook:
    """All ranks held, the stopped ones included, so that exported counters do not go backwards.

    Of `limit` ranks, those without an open stream make room for new ones, oldest first; their last counts stay in a
    sum per label pair. A rank that returns after that is refused, since its cumulative counts are in the sum already.
    At most `engine_limit` are of one engine instance.
    """

    def __init__(self, limit: int, engine_limit: int = MAX_RANKS) -> None:
        self.limit = limit
        self.engine_limit = engine_limit
        self.ranks: dict[RankKey, Rank] = {}
        self.retired: dict[Labels, Counter[tuple[str, str, str]]] = {}
        self._retired_totals: dict[Labels, Totals] = {}
        self._retired_keys: deque[RankKey] = deque(maxlen=MAX_RETIRED)
        self._gone: set[RankKey] = set()
        self._labels: set[Labels] = set()
        self._tenants: dict[str, str] = {}

    def admit(self, engine: summary_pb2.EngineInfo, publishes_for: str = "") -> Rank:
        """The rank that sent `engine`, by somebody who publishes for one tenant alone, or (empty) for all.

        Raises Fault if the description is unsound or changed, Refusal if full, or if the engine is another tenant's.
        """
        key = key_of(engine)
        rank = self.ranks.get(key)
        if rank is not None:
            if rank.publishes_for != publishes_for:
                raise Refusal("other_tenant")
            if rank.engine != engine:
                raise invalid("engine", "engine differs from what this rank said before; it is constant for its life")
            return rank
        check_engine(engine)
        if key in self._gone:
            raise Refusal("rank_retired")
        if self._tenants.setdefault(engine.instance, publishes_for) != publishes_for:
            raise Refusal("other_tenant")
        while len(self._tenants) > MAX_RETIRED:
            del self._tenants[next(iter(self._tenants))]
        if sum(held[0] == key[0] for held in self.ranks) >= self.engine_limit:
            raise Refusal("too_many_ranks_of_engine")
        if len(self.ranks) >= self.limit:
            self._retire()
        kept = summary_pb2.EngineInfo()
        kept.CopyFrom(engine)
        rank = self.ranks[key] = Rank(key, kept, self._label_pair(engine), publishes_for=publishes_for)
        return rank

    def opened(self, rank: Rank) -> None:
        """A stream of this rank began; it counts as newest."""
        rank.streams += 1
        self.ranks[rank.key] = self.ranks.pop(rank.key, rank)

    def connected(self) -> set[str]:
        """Engine instances of which a rank has an open stream."""
        return {rank.engine.instance for rank in self.ranks.values() if rank.streams}

    def close_silent(self, before: float) -> None:
        """Close the account of ranks whose last stream ended before a time."""
        for rank in self.ranks.values():
            if not rank.streams and 0 < rank.left_at < before:
                rank.ledger.close()
                rank.left_at = 0.0

    def totals(self, labels: Labels, ranks: Iterable[Rank]) -> Totals:
        """The sum over `ranks`, which carry these labels, and over the ranks that did and were retired."""
        gone = self._retired_totals.get(labels, Totals())
        total = replace(gone, arguments=gone.arguments.copy())
        for rank in ranks:
            total.add(rank)
        return total

    def _retire(self) -> None:
        stopped = next((rank for rank in self.ranks.values() if not rank.streams), None)
        if stopped is None:
            raise Refusal("too_many_ranks")
        del self.ranks[stopped.key]
        stopped.ledger.close()
        add_cells(self.retired.setdefault(stopped.labels, Counter()), stopped.ledger.cells())
        self._retired_totals.setdefault(stopped.labels, Totals()).add(stopped)
        if len(self._retired_keys) == MAX_RETIRED:
            self._gone.discard(self._retired_keys[0])
        self._retired_keys.append(stopped.key)
        self._gone.add(stopped.key)

    def _label_pair(self, engine: summary_pb2.EngineInfo) -> Labels:
        labels = (engine.model_name, engine.engine)
        if labels not in self._labels and len(self._labels) >= MAX_LABELS:
            return OTHER
        self._labels.add(labels)
        return labels
