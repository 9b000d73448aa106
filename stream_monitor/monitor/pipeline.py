"""A merged step -> traces -> sentences -> events: the way of the data inside the monitor, in order."""

import time
from collections.abc import Iterable

import numpy as np

from stream_monitor.monitor import views
from stream_monitor.monitor.archive import Archive
from stream_monitor.monitor.calibration import Calibration, capture_id
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.folding import fold
from stream_monitor.monitor.graveyard import Graveyard
from stream_monitor.monitor.identity import TraceKey
from stream_monitor.monitor.merge import MergedStep
from stream_monitor.monitor.metrics import Metrics, SentenceTally, exemplar
from stream_monitor.monitor.outcomes import ENGINE_QUOTA, known_request
from stream_monitor.monitor.ranks import Labels
from stream_monitor.monitor.sentence_matrix import Captured
from stream_monitor.monitor.store import TraceStore
from stream_monitor.monitor.text import NOT_SENT, TokenText, Vocabularies
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.v1alpha1 import monitor_pb2


class Pipeline:
    """Applies merged steps to the traces and publishes what comes of it.

    `archive` and `graveyard` may be left out where nothing is stored or deleted.
    """

    def __init__(
        self,
        store: TraceStore,
        log: EventLog,
        metrics: Metrics,
        calibration: Calibration,
        vocabularies: Vocabularies,
        archive: Archive | None = None,
        graveyard: Graveyard | None = None,
    ) -> None:
        self.store = store
        self.calibration = calibration
        self.vocabularies = vocabularies
        self.log = log
        self.log.sent = self._sent
        self.metrics = metrics
        self.archive = archive
        self.graveyard = graveyard
        self._touched: dict[TraceKey, RequestTrace] = {}
        self._ended: list[RequestTrace] = []

    def apply(self, step: MergedStep) -> None:
        """Starts, then rows, then tokens (a token is sampled from its step's row), then ends. What that closes is
        scored by `score`, together with what other steps close."""
        if self.graveyard:
            self.graveyard.strip(step)
        first = step.parts[0]
        instance, labels = step.instance, first.rank.labels
        if step.entries > self.store.room(instance):
            # Those that ended since the last time make room.
            self.score()
        if step.entries > self.store.room(instance):
            refused = step.leave_out(self.store.over_quota(instance), ENGINE_QUOTA)
            self.metrics.requests_refused.labels(*labels, ENGINE_QUOTA).inc(len(refused))
        now = first.summary.wall_time_ns or time.time_ns()
        if any(
            (instance, started.request_id) in self._touched for part in step.parts for started in part.summary.started
        ):
            # A start may cut a trace off, or replace it.
            self.score()
        touched: dict[str, RequestTrace] = {}

        def trace_of(request_id: str) -> RequestTrace:
            trace = touched.get(request_id)
            if trace is None:
                trace = touched[request_id] = seen(self.store.find_or_late(instance, request_id, labels, now))
            return trace

        def seen(trace: RequestTrace) -> RequestTrace:
            trace.last_seen_ns, trace.cut = now, False
            model = first.rank.engine.model_name
            if not trace.model_name:
                trace.model_name, trace.text = model, TokenText(self.vocabularies.of(model))
                trace.tenant = first.rank.tenant_unheard
            # A pipeline rank that watches none of its layers does not know what is captured.
            if not trace.capture and first.rank.heads:
                trace.capture = capture_id(first.rank.engine)
                trace.panel = self.calibration.panel(model, trace.capture)
            return trace

        for source, started in ((part.rank, started) for part in step.parts for started in part.summary.started):
            held = self.store.get(instance, started.request_id)
            if held is not None and held.ended_without(source, started):
                continue
            trace = seen(self.store.begin(instance, started.request_id, labels, now))
            trace.told_of_start(source)
            new = trace.joined_late
            if new:
                trace.tenant = source.tenant_of(started.tenant)
            touched[started.request_id] = trace
            trace.start(started)
            if new:
                self.metrics.requests_started.labels(*labels).inc()
                if trace.refused_reason:
                    self.metrics.requests_refused.labels(*labels, known_request(trace.refused_reason)).inc()
                self._progress(trace, monitor_pb2.EVENT_KIND_REQUEST_STARTED, now)
        if first.summary.step and not step.more:
            result = "late" if step.late else "partial" if step.missing or step.missing_of else "complete"
            self.metrics.steps.labels(*labels, result).inc()
        for row in step.rows:
            trace = trace_of(row.request_id)
            if step.missing:
                trace.missing_ranks.update(step.missing)
            trace.add_row(row)
        for request_id, names in step.missing_of.items():
            trace_of(request_id).missing_ranks.update(names)
        for source, run in ((part.rank, run) for part in step.parts for run in part.summary.tokens):
            trace = trace_of(run.request_id)
            trace.token_source = source
            missing = trace.missing_tokens
            trace.add_tokens(run)
            if trace.missing_tokens > missing:
                self.metrics.tokens_missing.labels(*labels).inc(trace.missing_tokens - missing)
        for source, finished in ((part.rank, end) for part in step.parts for end in part.summary.finished):
            held = self.store.get(instance, finished.request_id)
            # The end of a request that was never seen leaves nothing to keep. Where one rank sees the tokens, only that
            # one knows how many there were.
            if held is not None and not held.finished and held.token_source in (None, source):
                touched[finished.request_id] = seen(held)
                held.finish(finished.total_tokens)
                held.to_store = True
                self._ended.append(held)
        for trace in touched.values():
            self._touched[trace.instance, trace.request_id] = trace

    def score(self) -> None:
        """Score the sentences that were closed since the last call, and tell of requests that ended.

        Raises:
            Exception: the first that the scoring of a sentence raised, once all others are scored.
        """
        touched, self._touched = self._touched, {}
        ended, self._ended = self._ended, []
        tallies: dict[Labels, SentenceTally] = {}
        failure = self._score_settled(touched.values(), tallies)
        for labels, tally in tallies.items():
            self.metrics.of_sentences(labels).add(tally)
        for trace in ended:
            labels = trace.labels
            self.metrics.requests_finished.labels(*labels).inc()
            if trace.dropped_sentences:
                self.metrics.sentences_dropped.labels(*labels).inc(trace.dropped_sentences)
            if (reason := trace.text.reason) and (reason != NOT_SENT or self.vocabularies):
                self.metrics.requests_without_text.labels(*labels, reason).inc()
            self._progress(trace, monitor_pb2.EVENT_KIND_REQUEST_FINISHED, trace.last_seen_ns)
        for trace in touched.values():
            # Evictions look at what is marked.
            if self.archive is not None and trace.to_store:
                self.archive.mark(trace)
                trace.to_store = trace.finished
            self.store.changed(trace)
        if failure is not None:
            raise failure

    def _score_settled(self, touched: Iterable[RequestTrace], tallies: dict[Labels, SentenceTally]) -> Exception | None:
        failure: Exception | None = None
        settled = [(trace, index) for trace in touched for index in trace.settle()]
        for trace, index in settled:
            tally = tallies.get(trace.labels)
            if tally is None:
                tally = tallies[trace.labels] = SentenceTally(named=exemplar(trace.identity.external_id))
            try:
                self._score(trace, index, tally)
            except Exception as error:
                # The others are settled, and would not come here again.
                failure = failure or error
        return failure

    def _score(self, trace: RequestTrace, index: int, tally: SentenceTally) -> None:
        now = trace.last_seen_ns
        found = fold(trace.unfolded(index))
        captured = Captured.of(trace.rows.keep(index, found.folded).rows)
        seen = trace.observation(index, captured, found)
        if found.telling:
            put = trace.heads.put_opening if seen.opening else trace.heads.put
            put(index, found.shares)
        alarms = trace.panel.update(seen)
        tally.verdicts.update(trace.panel.verdicts.items())
        if not seen.opening:
            trace.top_anchor = seen.far.heaviest()
            tally.sentences += 1
            tally.anchor_mass += np.bincount(seen.roles[seen.far.columns], seen.far.shares, len(tally.anchor_mass))
            if captured.rows:
                tally.unobserved.append(captured.unobserved)
        for alarm in alarms:
            finding = views.alarm_event(trace, index, alarm, found.shares, captured.unobserved, now)
            trace.findings.append(finding)
            trace.finding_count += 1
            trace.to_store = True
            name = monitor_pb2.EventKind.Name(finding.kind).removeprefix("EVENT_KIND_")
            severity = monitor_pb2.Severity.Name(finding.severity).removeprefix("SEVERITY_").lower()
            named = exemplar(trace.identity.external_id)
            self.metrics.events.labels(*trace.labels, name, severity).inc(exemplar=named)
            self.log.publish(finding)
        if seen.opening:
            return
        if self.log.progress_wanted:
            self.log.publish(views.sentence_event(trace, index, seen.far, captured.unobserved, now))
        else:
            self.log.publish(views.sentence_closed(trace, index), quietly=True)

    def _sent(self, event: monitor_pb2.Event) -> None:
        """One event a sentence, the last: findings of it went out before."""
        if event.kind == monitor_pb2.EVENT_KIND_SENTENCE_CLOSED:
            delay = max(0.0, (time.time_ns() - event.closed_time_ns) / 1e9)
            series = self.metrics.of_sentences((event.model_name, event.engine))
            series.event_delay.observe(delay, exemplar(event.external_id))

    def _progress(self, trace: RequestTrace, kind: monitor_pb2.EventKind.ValueType, now: int) -> None:
        self.log.publish(views.progress_event(trace, kind, now))
