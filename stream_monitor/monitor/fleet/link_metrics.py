"""What a monitor shows Prometheus of its part in a fleet; one without a broker has no samples of it."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric

from stream_monitor.monitor import metric_table as table
from stream_monitor.monitor.fleet.metric_table import REASONS
from stream_monitor.monitor.fleet.outbox import LOSSES, RECORDS
from stream_monitor.monitor.scrape import Family, family

if TYPE_CHECKING:
    from stream_monitor.monitor.fleet.link import Link


class LinkCollector:
    """A prometheus_client collector over one monitor's link."""

    def __init__(self, link: "Link | None") -> None:
        self._link = link

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families appear with the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        samples = dict(self._families(self._link)) if self._link is not None else {}
        for definition in table.TABLE:
            if definition.section == table.NATS_UP.section:
                yield family(definition, samples.get(definition, ()))

    def _families(self, link: "Link") -> Iterator[Family]:
        sender, outbox, broker = link.sender, link.outbox, link.sender.broker
        yield table.NATS_UP, [((), not broker.trouble)]
        yield table.NATS_FAILURES, [((reason,), broker.failures[reason]) for reason in REASONS]
        yield table.NATS_SENT, [((record,), sender.sent[record]) for record in RECORDS]
        yield table.NATS_SHORTENED, [((), sender.shortened)]
        yield table.NATS_OUTBOX, [((record,), outbox.waiting[record]) for record in RECORDS]
        cells = [(record, reason) for record in RECORDS for reason in LOSSES]
        yield table.NATS_LOST, [(cell, outbox.lost[cell]) for cell in cells]
