"""What a process of the fleet shows Prometheus, under a prefix of its own: a sum over monitors counts nothing twice."""

import time
from collections.abc import Iterable, Iterator

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.metrics_core import Metric

from stream_monitor.monitor.access import refusals
from stream_monitor.monitor.access.access import Access
from stream_monitor.monitor.access.access_metrics import AccessCollector
from stream_monitor.monitor.archive import Archive
from stream_monitor.monitor.deletion import Deletion
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.fleet import metric_table as table
from stream_monitor.monitor.fleet import names, shelf
from stream_monitor.monitor.fleet.broker import Broker
from stream_monitor.monitor.fleet.metric_table import REASONS
from stream_monitor.monitor.fleet.reader import Reader
from stream_monitor.monitor.metric_table import Definition
from stream_monitor.monitor.page import guard
from stream_monitor.monitor.scrape import Family, family
from stream_monitor.v1alpha1 import monitor_pb2

# As in a monitor's: `_created` series tell nothing that Prometheus uses.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

READ_CELLS = [
    *((record, outcome) for record in (names.FINDING, names.TRACE) for outcome in (shelf.READ, shelf.LATE)),
    (names.FINDING, shelf.DUPLICATE),
    (names.DELETED, shelf.READ),
    ("other", shelf.MALFORMED),
]


class FleetMetrics:
    """The instruments, in a registry of their own, and a collector over the parts of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.commits = self._histogram(table.COMMITS)
        self._delay = self._histogram(table.EVENT_DELAY)
        self._page_refused = self._counter(table.PAGE_REFUSED)
        for reason in (guard.HOST, guard.CROSS_SITE, guard.TOO_MANY_PAGES):
            self._page_refused.labels(reason)
        self._access_refused = self._counter(table.ACCESS_REFUSED)
        for reason, (places, _) in refusals.REASONS.items():
            for where in places:
                self._access_refused.labels(where, reason)
        ProcessCollector(registry=self.registry)

    def watch(
        self,
        version: str,
        broker: Broker,
        reader: Reader,
        log: EventLog,
        archive: Archive,
        deletion: Deletion,
        access: Access,
    ) -> None:
        """Show the state of these."""
        self._version, self._broker, self._reader = version, broker, reader
        self._log, self._archive, self._deletion = log, archive, deletion
        self.registry.register(self)
        self.registry.register(AccessCollector(access, table.ACCESS_RELOADS, table.TLS_EXPIRY))

    def sent(self, event: monitor_pb2.Event) -> None:
        """A finding was handed to subscribers."""
        self._delay.observe(max(0.0, (time.time_ns() - event.closed_time_ns) / 1e9))

    def page_refused(self, reason: str) -> None:
        """The page refused something."""
        self._page_refused.labels(reason).inc()

    def access_refused(self, where: str, reason: str) -> None:
        """Somebody was turned away."""
        self._access_refused.labels(where, reason).inc()

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families appear with the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        for definition, samples in self._families():
            yield family(definition, samples)

    def _families(self) -> Iterator[Family]:
        reader, log, recorder = self._reader, self._log, self._archive.recorder
        yield table.BUILD_INFO, [((self._version,), 1)]
        yield table.UP, [((), not self._broker.trouble)]
        yield table.FAILURES, [((reason,), self._broker.failures[reason]) for reason in REASONS]
        yield table.LAG, [((), reader.lag)]
        yield table.POSITION, [((), reader.position)]
        yield table.READ, [(cell, reader.read[cell]) for cell in READ_CELLS]
        yield table.EXPIRED, [((), reader.expired)]
        yield table.HELD, [((record,), reader.held[record]) for record in (names.FINDING, names.TRACE)]
        yield table.STORE_UP, [((), recorder is not None and not recorder.trouble)]
        yield table.STORE_SET_ASIDE, [((), recorder.set_aside if recorder is not None else 0)]
        yield table.REQUESTS_DELETED, [((), self._deletion.requests)]
        yield table.SUBSCRIBERS, [((), len(log.subscribers))]
        yield table.SUBSCRIBER_LOST, [((), log.lost)]

    def _counter(self, made: Definition) -> Counter:
        return Counter(made.name, made.text, made.labels, registry=self.registry)

    def _histogram(self, made: Definition) -> Histogram:
        return Histogram(made.name, made.text, made.labels, buckets=made.buckets, registry=self.registry)
