"""Metrics read from the store's state when Prometheus asks; a monitor without a store has no samples of them."""

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import Metric

from stream_monitor.monitor import metric_table as table
from stream_monitor.monitor.archive import Archive
from stream_monitor.monitor.deletion import Deletion
from stream_monitor.monitor.recorder import Recorder
from stream_monitor.monitor.recovery import REASONS
from stream_monitor.monitor.scrape import Family, family

RECORDS = ("event", "trace")


class StoreCollector:
    """A prometheus_client collector over one monitor's store."""

    def __init__(self, archive: Archive, deletion: Deletion) -> None:
        self.archive = archive
        self.deletion = deletion

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families appear with the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield family(table.REQUESTS_DELETED, [((), self.deletion.requests)])
        recorder = self.archive.recorder
        samples = dict(self._store(recorder)) if recorder is not None else {}
        for definition in table.TABLE:
            if definition.section == table.STORE_UP.section and definition is not table.STORE_COMMITS:
                yield family(definition, samples.get(definition, ()))

    def _store(self, recorder: Recorder) -> Iterator[Family]:
        yield table.STORE_UP, [((), not recorder.trouble)]
        yield table.STORE_BYTES, [((), self.archive.bytes)]
        yield table.STORE_LIMIT, [((), self.archive.max_bytes)]
        yield table.STORE_SET_ASIDE, [((), recorder.set_aside)]
        yield table.STORE_QUEUE, [((record,), count) for record, count in recorder.waiting().items()]
        yield table.STORE_WRITTEN, [((record,), recorder.written[record]) for record in RECORDS]
        for definition, counts, reasons in (
            (table.STORE_LOST, recorder.lost, REASONS),
            (table.STORE_REMOVED, self.archive.removed, ("age", "size", "deleted")),
        ):
            cells = [(record, reason) for record in RECORDS for reason in reasons]
            yield definition, [(cell, counts[cell]) for cell in cells]
