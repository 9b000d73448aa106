"""Metrics of access that are read when Prometheus asks."""

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import Metric

from stream_monitor.monitor import metric_table as table
from stream_monitor.monitor.access.access import Access
from stream_monitor.monitor.scrape import family

CERTIFICATE, ACCESS = "certificate", "access"


class AccessCollector:
    """A prometheus_client collector over one process's access."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families appear with the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        certificates = self._access.certificates
        reloads = {CERTIFICATE: certificates.reloads if certificates else {}, ACCESS: self._access.book.reloads}
        counts = [((file, outcome), counts[outcome]) for file, counts in reloads.items() for outcome in counts]
        yield family(table.ACCESS_RELOADS, counts)
        expiry = certificates.not_after if certificates else {}
        yield family(table.TLS_EXPIRY, [((file,), at) for file, at in expiry.items()])
