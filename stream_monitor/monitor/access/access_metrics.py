"""Metrics of access that are read when Prometheus asks."""

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import Metric

from stream_monitor.monitor import metric_table as table
from stream_monitor.monitor.access.access import Access
from stream_monitor.monitor.metric_table import Definition
from stream_monitor.monitor.scrape import family

CERTIFICATE, ACCESS = "certificate", "access"


class AccessCollector:
    """A prometheus_client collector over one process's access, under the names of that kind of process."""

    def __init__(
        self, access: Access, reloads: Definition = table.ACCESS_RELOADS, expiry: Definition = table.TLS_EXPIRY
    ) -> None:
        self._access = access
        self._reloads = reloads
        self._expiry = expiry

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families appear with the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        certificates = self._access.certificates
        reloads = {CERTIFICATE: certificates.reloads if certificates else {}, ACCESS: self._access.book.reloads}
        counts = [((file, outcome), counts[outcome]) for file, counts in reloads.items() for outcome in counts]
        yield family(self._reloads, counts)
        expiry = certificates.not_after if certificates else {}
        yield family(self._expiry, [((file,), at) for file, at in expiry.items()])
