"""Metrics read from the monitor's state when Prometheus asks: accounts of ranks, queues, traces, subscribers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from stream_monitor.monitor import metric_table as table
from stream_monitor.monitor import outcomes
from stream_monitor.monitor.calibration import Calibration
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.ledger import CHUNK, TOKEN
from stream_monitor.monitor.merge import MAX_WAITING_BYTES, Merger
from stream_monitor.monitor.metric_table import Definition
from stream_monitor.monitor.ranks import Labels, Rank, RankBook
from stream_monitor.monitor.store import TraceStore

Sample = tuple[Sequence[str], float]
"""Label values and value."""
Family = tuple[Definition, Iterable[Sample]]

ENGINE_QUEUES = ("estimator", "ring", "backlog")
"""Queues of which ranks tell, `summary.proto` QueueState."""


class StateCollector:
    """A prometheus_client collector over the parts of one monitor."""

    def __init__(
        self,
        version: str,
        ranks: RankBook,
        merger: Merger,
        store: TraceStore,
        log: EventLog,
        calibration: Calibration,
    ) -> None:
        self.version = version
        self.ranks = ranks
        self.merger = merger
        self.store = store
        self.log = log
        self.calibration = calibration

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families appear with the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Everything, summed over the ranks of each label pair."""
        engines: dict[Labels, list[Rank]] = {pair: [] for pair in self.ranks.retired}
        for rank in self.ranks.ranks.values():
            engines.setdefault(rank.labels, []).append(rank)
        for definition, samples in chain(
            self._rows(engines),
            self._totals(engines),
            self._connected(engines),
            self._queues(engines),
            self._profiles(),
            self._monitor(),
        ):
            yield family(definition, samples)

    def _rows(self, engines: dict[Labels, list[Rank]]) -> Iterator[Family]:
        expected: list[Sample] = []
        rows: list[Sample] = []
        for pair, ranks in engines.items():
            cells = {
                (phase, outcome, reason): 0
                for phase in (TOKEN, CHUNK)
                for outcome, (_, reasons) in outcomes.ROWS.items()
                for reason in reasons
            }
            phases: Counter[str] = Counter({TOKEN: 0, CHUNK: 0})
            counted = chain(self.ranks.retired.get(pair, {}).items(), *(rank.ledger.cells() for rank in ranks))
            for (phase, outcome, reason), count in counted:
                if outcome == "expected":
                    phases[phase] += count
                else:
                    cells[(phase, *outcomes.known_row(outcome, reason))] += count
            expected += [((*pair, phase), count) for phase, count in phases.items()]
            rows += [((*pair, *cell), count) for cell, count in cells.items()]
        yield table.ROWS_EXPECTED, expected
        yield table.ROWS, rows

    def _totals(self, engines: dict[Labels, list[Rank]]) -> Iterator[Family]:
        totals = {pair: self.ranks.totals(pair, ranks) for pair, ranks in engines.items()}
        yield table.ESTIMATES, [(pair, each.estimates) for pair, each in totals.items()]
        yield table.ESTIMATE_SECONDS, [(pair, each.estimate_seconds) for pair, each in totals.items()]
        yield table.HOOK_SECONDS, [(pair, each.hook_seconds) for pair, each in totals.items()]
        yield table.DEVICE_WAITS, [(pair, each.device_waits) for pair, each in totals.items()]
        yield table.KEY_BYTES, [(pair, each.key_bytes) for pair, each in totals.items()]
        yield table.RECORD_BYTES, [(pair, each.record_bytes) for pair, each in totals.items()]
        yield table.SENT, [(pair, each.sent) for pair, each in totals.items()]
        yield table.MESSAGES_LOST, [(pair, each.lost_messages) for pair, each in totals.items()]
        arguments: list[Sample] = []
        for pair, each in totals.items():
            counts = dict.fromkeys(outcomes.ARGUMENTS, 0)
            for key, count in each.arguments.items():
                name, _, reason = key.partition(":")
                counts[outcomes.known_argument(name, reason)] += count
            arguments += [((*pair, *labels), count) for labels, count in counts.items()]
        yield table.ARGUMENTS_REFUSED, arguments

    def _connected(self, engines: dict[Labels, list[Rank]]) -> Iterator[Family]:
        live = {pair: [rank for rank in ranks if rank.streams] for pair, ranks in engines.items()}
        instances = {pair: {rank.engine.instance for rank in ranks} for pair, ranks in live.items()}
        yield table.ENGINES_CONNECTED, [(pair, len(found)) for pair, found in instances.items()]
        yield table.RANKS_CONNECTED, [(pair, len(ranks)) for pair, ranks in live.items()]
        faulty = {pair: sum(bool(rank.ledger.newest.fault) for rank in ranks) for pair, ranks in live.items()}
        yield table.RANKS_FAULTY, list(faulty.items())
        kinds = {
            (*pair, rank.engine.vllm_version, rank.engine.plugin_version, rank.engine.geometry.strategy): 1.0
            for pair, ranks in live.items()
            for rank in ranks
        }
        yield table.ENGINE_INFO, list(kinds.items())
        active = Counter(
            trace.labels
            for trace in self.store.newest_first()
            if not trace.finished and trace.instance in instances.get(trace.labels, ())
        )
        yield table.REQUESTS_ACTIVE, [(pair, active[pair]) for pair in live]
        held = {pair: sum(rank.engine.summary_bytes for rank in ranks) for pair, ranks in live.items()}
        yield table.SUMMARY_BYTES, list(held.items())
        strides = {pair: max((rank.ledger.newest.stride for rank in ranks), default=0) for pair, ranks in live.items()}
        yield table.STRIDE, list(strides.items())
        lost = {pair: max((rank.engine.kv_tokens_lost for rank in ranks), default=0) for pair, ranks in live.items()}
        yield table.KV_TOKENS_LOST, list(lost.items())

    def _queues(self, engines: dict[Labels, list[Rank]]) -> Iterator[Family]:
        sizes: list[Sample] = []
        capacities: list[Sample] = []
        merging = self.merger.waiting()
        for pair, ranks in engines.items():
            levels = dict.fromkeys(ENGINE_QUEUES, (0, 0))
            levels["merge"] = (merging.get(pair, 0), MAX_WAITING_BYTES)
            for queue in (queue for rank in ranks if rank.streams for queue in rank.ledger.newest.queues):
                if queue.name in ENGINE_QUEUES:
                    size, capacity = levels[queue.name]
                    # Fuller than what stands there, by share; without a division by what may be 0.
                    if not capacity or queue.size * capacity > size * queue.capacity:
                        levels[queue.name] = (queue.size, queue.capacity)
            sizes += [((*pair, name), size) for name, (size, _) in levels.items()]
            capacities += [((*pair, name), capacity) for name, (_, capacity) in levels.items()]
        yield table.QUEUE_SIZE, sizes
        yield table.QUEUE_CAPACITY, capacities

    def _profiles(self) -> Iterator[Family]:
        made = [((each.model_name, each.capture), each.made_unix) for each in self.calibration.profiles]
        yield table.PROFILE_MADE, made
        yield table.UNCALIBRATED, [((model_name,), count) for model_name, count in self.calibration.missing.items()]

    def _monitor(self) -> Iterator[Family]:
        store, log = self.store, self.log
        yield table.BUILD_INFO, [((self.version,), 1)]
        yield table.TRACES, [(("running",), len(store) - store.finished), (("finished",), store.finished)]
        yield table.TRACES_EVICTED, [((limit,), count) for limit, count in store.evicted.items()]
        for definition, value in (
            (table.TRACES_LIMIT, store.max_traces),
            (table.TRACES_BYTES, store.bytes),
            (table.TRACES_BYTES_LIMIT, store.max_bytes),
            (table.TRACES_LATE, store.late),
            (table.TRACES_REPLACED, store.replaced),
            (table.SUBSCRIBERS, len(log.subscribers)),
            (table.SUBSCRIBER_QUEUE, max((each.waiting for each in log.subscribers), default=0)),
            (table.SUBSCRIBER_QUEUE_LIMIT, log.queue),
            (table.SUBSCRIBER_LOST, log.lost),
        ):
            yield definition, [((), value)]


def family(definition: Definition, samples: Iterable[Sample]) -> Metric:
    """A definition with its samples, as prometheus_client exports it."""
    if definition.kind == "info":
        info = InfoMetricFamily(definition.name.removesuffix("_info"), definition.text)
        for labels, _ in samples:
            info.add_metric((), dict(zip(definition.labels, labels, strict=True)))
        return info
    kind = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    metric = kind(definition.name, definition.text, labels=definition.labels)
    for labels, value in samples:
        metric.add_metric(labels, value)
    return metric
