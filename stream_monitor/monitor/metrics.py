"""What the parts of the monitor count for Prometheus while they work. `scrape.py` reads the rest when it is asked."""

import collections
from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import prometheus_client
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

from stream_monitor.anchors.panel import Kind
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.monitor import metric_table as table
from stream_monitor.monitor import outcomes, text
from stream_monitor.monitor.access import refusals
from stream_monitor.monitor.metric_table import Definition
from stream_monitor.monitor.page import guard
from stream_monitor.monitor.ranks import Labels
from stream_monitor.v1alpha1 import summary_pb2

EXEMPLAR_CHARACTERS = 128
"""Most that OpenMetrics allows the labels of an exemplar, names and values together."""
ROLES: dict[int, str] = {
    number: name.removeprefix("ROLE_").lower().replace("unspecified", "unknown")
    for name, number in summary_pb2.Role.items()
}
"""Values of the label `role`."""
RESULTS = ("complete", "partial", "late")


@dataclass(slots=True)
class SentenceTally:
    """Sentences that were scored together: counted here first, as counting on a series takes locks and checks.

    Attributes:
        anchor_mass: by `summary.proto` Role.
        unobserved: of each sentence that has rows.
        named: exemplar.
    """

    sentences: int = 0
    verdicts: collections.Counter[tuple[Kind, Verdict]] = field(default_factory=collections.Counter)
    anchor_mass: NDArray[np.float64] = field(default_factory=lambda: np.zeros(max(ROLES) + 1))
    unobserved: list[float] = field(default_factory=list)
    named: dict[str, str] | None = None


class SentenceSeries(NamedTuple):
    """What every closed sentence of an engine counts on: found once, as looking labels up costs more than counting.

    Attributes:
        anchor_mass: by `summary.proto` Role.
    """

    sentences: Counter
    unobserved: Histogram
    event_delay: Histogram
    anchor_mass: dict[int, Counter]
    verdicts: dict[tuple[Kind, Verdict], Counter]

    def add(self, tally: "SentenceTally") -> None:
        """Count some sentences; the first of them is the exemplar."""
        self.sentences.inc(tally.sentences)
        for verdict, count in tally.verdicts.items():
            self.verdicts[verdict].inc(count)
        for role, share in enumerate(tally.anchor_mass.tolist()):
            if share:
                self.anchor_mass[role].inc(share)
        named = tally.named
        for share in tally.unobserved:
            self.unobserved.observe(share, named)
            named = None


# `_created` series would double the export and tell nothing that Prometheus uses.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The instruments. Own registry, so that no other library's metrics get in."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.messages = self._counter(table.MESSAGES)
        self.message_bytes = self._counter(table.MESSAGE_BYTES)
        self.step_delay = self._histogram(table.STEP_DELAY)
        self.steps = self._counter(table.STEPS)
        self.requests_started = self._counter(table.REQUESTS_STARTED)
        self.requests_finished = self._counter(table.REQUESTS_FINISHED)
        self.requests_refused = self._counter(table.REQUESTS_REFUSED)
        self.requests_without_text = self._counter(table.REQUESTS_WITHOUT_TEXT)
        self.sentences = self._counter(table.SENTENCES)
        self.sentences_dropped = self._counter(table.SENTENCES_DROPPED)
        self.tokens_missing = self._counter(table.TOKENS_MISSING)
        self.anchor_mass = self._counter(table.ANCHOR_MASS)
        self.verdicts = self._counter(table.VERDICTS)
        self.events = self._counter(table.EVENTS)
        self.event_delay = self._histogram(table.EVENT_DELAY)
        self.recall = self._histogram(table.RECALL)
        self.unobserved = self._histogram(table.UNOBSERVED)
        self.store_commits = self._histogram(table.STORE_COMMITS)
        self.page_refused = self._counter(table.PAGE_REFUSED)
        self.access_refused = self._counter(table.ACCESS_REFUSED)
        ProcessCollector(registry=self.registry)
        self._known: set[Labels] = set()
        self._of_sentences: dict[Labels, SentenceSeries] = {}
        for outcome, (_, reasons) in outcomes.MESSAGES.items():
            for reason in reasons:
                self.messages.labels(outcome, reason)
        for reason in (guard.HOST, guard.CROSS_SITE, guard.TOO_MANY_PAGES):
            self.page_refused.labels(reason)
        for reason, (places, _) in refusals.REASONS.items():
            for where in places:
                self.access_refused.labels(where, reason)

    def know(self, labels: Labels) -> None:
        """Show an engine's series, at 0, from the moment it connects: `rate` sees no rise from nothing."""
        if labels in self._known:
            return
        self._known.add(labels)
        for metric in (
            self.step_delay,
            self.requests_started,
            self.requests_finished,
            self.sentences_dropped,
            self.tokens_missing,
            self.recall,
        ):
            metric.labels(*labels)
        for result in RESULTS:
            self.steps.labels(*labels, result)
        for reason in outcomes.REQUESTS:
            self.requests_refused.labels(*labels, reason)
        for reason in (text.NOT_SENT, text.NO_TOKENIZER, text.MISMATCH):
            self.requests_without_text.labels(*labels, reason)
        for kind in Kind:
            self.events.labels(*labels, kind.name, "warning")
        self.of_sentences(labels)

    def of_sentences(self, labels: Labels) -> SentenceSeries:
        """The series that sentences of this engine count on."""
        found = self._of_sentences.get(labels)
        if found is None:
            found = self._of_sentences[labels] = SentenceSeries(
                sentences=self.sentences.labels(*labels),
                unobserved=self.unobserved.labels(*labels),
                event_delay=self.event_delay.labels(*labels),
                anchor_mass={number: self.anchor_mass.labels(*labels, role) for number, role in ROLES.items()},
                verdicts={
                    (kind, verdict): self.verdicts.labels(*labels, kind.value, verdict.value)
                    for kind in Kind
                    for verdict in Verdict
                },
            )
        return found

    def forget(self, external_ids: Container[str]) -> None:
        """Take back exemplars that name these requests. prometheus_client has no public way to do so."""
        children = [
            child
            for metric in (self.step_delay, self.event_delay, self.unobserved, self.events)
            for child in metric._metrics.values()
        ]
        for child in children:
            for value in getattr(child, "_buckets", None) or [getattr(child, "_value")]:  # noqa: B009
                held = value.get_exemplar()
                if held is not None and held.labels["request_id"] in external_ids:
                    value.set_exemplar(None)

    def refused(self, where: str, reason: str) -> None:
        """Somebody was turned away; see `refusals.REASONS`."""
        self.access_refused.labels(where, reason).inc()

    def _counter(self, made: Definition) -> Counter:
        return Counter(made.name, made.text, made.labels, registry=self.registry)

    def _histogram(self, made: Definition) -> Histogram:
        return Histogram(made.name, made.text, made.labels, buckets=made.buckets, registry=self.registry)


def exemplar(request_id: str) -> dict[str, str] | None:
    """Exemplar that names a request. None if its id is too long: cut short, it would name nothing."""
    labels = {"request_id": request_id}
    return labels if len("request_id") + len(request_id) <= EXEMPLAR_CHARACTERS else None
