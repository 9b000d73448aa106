"""What Prometheus sees. Own registry; request ids are never labels; `model_name` and `engine` are vLLM's own labels."""

from collections import Counter as CellCounter
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from stream_monitor.monitor.calibration import Calibration
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.ledger import Cell, add_cells
from stream_monitor.monitor.ranks import Labels, RankBook
from stream_monitor.monitor.store import TraceStore

ENGINE = ("model_name", "engine")


class Metrics:
    """Counters the parts of the monitor add to; the rest is read from them when Prometheus asks."""

    def __init__(
        self, version: str, ranks: RankBook, store: TraceStore, log: EventLog, calibration: Calibration
    ) -> None:
        registry = self.registry = CollectorRegistry()
        self.messages = Counter(
            "stream_monitor_messages_total",
            "Messages that arrived on Publish, by fate: accepted, duplicate, refused or invalid, and why.",
            ("outcome", "reason"),
            registry=registry,
        )
        self.message_bytes = Counter("stream_monitor_message_bytes_total", "Bytes of them.", registry=registry)
        self.delay = Histogram(
            "stream_monitor_step_delay_seconds",
            "From the end of a step's forward pass, by the engine host's clock, until it was taken in.",
            ENGINE,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60),
            registry=registry,
        )
        self.steps = Counter(
            "stream_monitor_steps_total",
            "Engine steps with rows: complete, or partial where ranks were missing at the merge deadline.",
            (*ENGINE, "result"),
            registry=registry,
        )
        self.requests_started = Counter(
            "stream_monitor_requests_started_total", "Requests seen to start.", ENGINE, registry=registry
        )
        self.requests_finished = Counter(
            "stream_monitor_requests_finished_total", "Requests seen to finish.", ENGINE, registry=registry
        )
        self.requests_refused = Counter(
            "stream_monitor_requests_refused_total", "Requests the engine does not capture.", ENGINE, registry=registry
        )
        self.requests_without_text = Counter(
            "stream_monitor_requests_without_text_total",
            "Finished requests whose token ids came and could not be read, or should have come and did not, by "
            "RequestInfo.no_text_reason.",
            (*ENGINE, "reason"),
            registry=registry,
        )
        self.sentences = Counter(
            "stream_monitor_sentences_total",
            "Sentences of the output that were closed and scored.",
            ENGINE,
            registry=registry,
        )
        self.verdicts = Counter(
            "stream_monitor_verdicts_total",
            "What each detector said of them: insufficient (too few rows, or nothing to look at), warm_up, steady or "
            "alarm.",
            (*ENGINE, "kind", "verdict"),
            registry=registry,
        )
        self.sentences_dropped = Counter(
            "stream_monitor_sentences_dropped_total",
            "Sentences beyond max_sentences of their request, counted and not kept.",
            ENGINE,
            registry=registry,
        )
        self.tokens_missing = Counter(
            "stream_monitor_tokens_missing_total",
            "Token positions jumped over between token runs, so that sentence boundaries in them are unknown.",
            ENGINE,
            registry=registry,
        )
        self.events = Counter(
            "stream_monitor_events_total", "Findings raised.", (*ENGINE, "kind", "severity"), registry=registry
        )
        self.recall = Histogram(
            "stream_monitor_audit_recall_ratio",
            "Mass on the kept blocks over the mass of the heaviest blocks, from rows recomputed exactly.",
            ENGINE,
            buckets=(0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0),
            registry=registry,
        )
        self.unobserved = Histogram(
            "stream_monitor_unobserved_share_ratio",
            "Share of attention mass the search did not observe, mean of each output sentence.",
            ENGINE,
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),
            registry=registry,
        )
        ProcessCollector(registry=registry)
        registry.register(_StateCollector(version, ranks, store, log, calibration))


class _StateCollector:
    """Ledgers, traces and subscribers as they are at the moment of the scrape."""

    def __init__(
        self, version: str, ranks: RankBook, store: TraceStore, log: EventLog, calibration: Calibration
    ) -> None:
        self.version = version
        self.calibration = calibration
        self.ranks = ranks
        self.store = store
        self.log = log

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families appear with the first scrape."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All families, summed over the ranks of each label pair."""
        yield InfoMetricFamily("stream_monitor_build", "Version.", value={"version": self.version})
        yield from self._ledger()
        yield from self._ranks()
        yield from self._held()
        yield from self._profiles()

    def _profiles(self) -> Iterable[Metric]:
        made = GaugeMetricFamily(
            "stream_monitor_profile_timestamp_seconds",
            "When the calibration profile of a model and capture was made, Unix time.",
            labels=("model_name", "capture"),
        )
        for profile in self.calibration.profiles:
            made.add_metric((profile.model_name, profile.capture), profile.made_unix)
        yield made
        missing = CounterMetricFamily(
            "stream_monitor_uncalibrated_requests",
            "Requests of a model and capture without a profile: their findings have no known rate of false alarms.",
            labels=("model_name",),
        )
        for model_name, count in self.calibration.missing.items():
            missing.add_metric((model_name,), count)
        yield missing

    def _summaries(self) -> Iterable[Metric]:
        held = GaugeMetricFamily(
            "stream_monitor_summary_bytes", "Engine memory that block summaries take, over all ranks.", labels=ENGINE
        )
        lost = GaugeMetricFamily(
            "stream_monitor_kv_cache_tokens_lost",
            "Tokens that the KV cache would hold more without block summaries, on the rank that lost most.",
            labels=ENGINE,
        )
        ranks = self.ranks.ranks.values()
        for pair in sorted({rank.labels for rank in ranks}):
            own = [rank.engine for rank in ranks if rank.labels == pair and rank.streams]
            held.add_metric(pair, sum(engine.summary_bytes for engine in own))
            lost.add_metric(pair, max((engine.kv_tokens_lost for engine in own), default=0))
        yield held
        yield lost

    def _ledger(self) -> Iterable[Metric]:
        cells: dict[Labels, CellCounter[Cell]] = {pair: CellCounter(kept) for pair, kept in self.ranks.retired.items()}
        estimates: CellCounter[Labels] = CellCounter()
        seconds: dict[Labels, float] = {}
        arguments: CellCounter[tuple[str, ...]] = CellCounter()
        for rank in self.ranks.ranks.values():
            for key, count in rank.ledger.newest.refused_arguments.items():
                arguments[(*rank.labels, *key.split(":"))] += count
            add_cells(cells.setdefault(rank.labels, CellCounter()), rank.ledger.cells())
            estimates[rank.labels] += rank.ledger.newest.estimates
            seconds[rank.labels] = seconds.get(rank.labels, 0.0) + rank.ledger.newest.estimate_seconds
        expected = CounterMetricFamily(
            "stream_monitor_rows_expected",
            "Rows x layers x query heads that should have been captured; phase chunk: ends of prefill chunks. Equals "
            "the sum of stream_monitor_rows_total when nothing is in flight.",
            labels=(*ENGINE, "phase"),
        )
        rows = CounterMetricFamily(
            "stream_monitor_rows",
            "What became of them: captured, sampled_out, dropped, raced, refused or discarded, and why.",
            labels=(*ENGINE, "phase", "outcome", "reason"),
        )
        for pair, counts in cells.items():
            for (phase, outcome, reason), count in counts.items():
                if outcome == "expected":
                    expected.add_metric((*pair, phase), count)
                else:
                    rows.add_metric((*pair, phase, outcome, reason), count)
        yield expected
        yield rows
        calls = CounterMetricFamily("stream_monitor_estimates", "Estimator calls.", labels=ENGINE)
        time = CounterMetricFamily("stream_monitor_estimate_seconds", "Their run time.", labels=ENGINE)
        for pair in seconds:
            calls.add_metric(pair, estimates[pair])
            time.add_metric(pair, seconds[pair])
        yield calls
        yield time
        yield from self._summaries()
        refused = CounterMetricFamily(
            "stream_monitor_request_arguments_refused",
            "Arguments of requests (vllm_xargs) that were not honoured, and why.",
            labels=(*ENGINE, "argument", "reason"),
        )
        for labels, count in arguments.items():
            refused.add_metric(labels, count)
        yield refused

    def _ranks(self) -> Iterable[Metric]:
        connected: CellCounter[Labels] = CellCounter()
        faulty: CellCounter[Labels] = CellCounter()
        lost: CellCounter[Labels] = CellCounter()
        for rank in self.ranks.ranks.values():
            connected[rank.labels] += rank.streams > 0
            faulty[rank.labels] += rank.streams > 0 and bool(rank.ledger.newest.fault)
            lost[rank.labels] += rank.lost_messages
        for name, text, values in (
            ("stream_monitor_ranks_connected", "Engine ranks with an open stream.", connected),
            ("stream_monitor_ranks_faulty", "Connected ranks whose capture a fault turned off.", faulty),
        ):
            gauge = GaugeMetricFamily(name, text, labels=ENGINE)
            for pair, value in values.items():
                gauge.add_metric(pair, value)
            yield gauge
        gaps = CounterMetricFamily(
            "stream_monitor_messages_lost", "Sequence numbers that never arrived from ranks held.", labels=ENGINE
        )
        for pair, value in lost.items():
            gaps.add_metric(pair, value)
        yield gaps

    def _held(self) -> Iterable[Metric]:
        traces = GaugeMetricFamily("stream_monitor_traces", "Request traces held.", labels=("state",))
        traces.add_metric(("running",), len(self.store) - self.store.finished)
        traces.add_metric(("finished",), self.store.finished)
        yield traces
        yield GaugeMetricFamily("stream_monitor_traces_bytes", "Their estimated memory.", value=self.store.bytes)
        evicted = CounterMetricFamily(
            "stream_monitor_traces_evicted", "Traces that made room: limit on count or on bytes.", labels=("limit",)
        )
        for limit, count in self.store.evicted.items():
            evicted.add_metric((limit,), count)
        yield evicted
        for name, text, value in (
            ("stream_monitor_traces_late", "Traces of requests whose start was not seen.", self.store.late),
            ("stream_monitor_traces_replaced", "Finished traces whose id was used again.", self.store.replaced),
            ("stream_monitor_subscriber_events_lost", "Events lost to subscribers that read slowly.", self.log.lost),
        ):
            yield CounterMetricFamily(name, text, value=value)
        yield GaugeMetricFamily("stream_monitor_subscribers", "Open subscriptions.", value=len(self.log.subscribers))
