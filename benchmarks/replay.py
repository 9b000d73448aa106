"""A recording through the monitor as if it had been served: its own ingest, merge, traces and detectors."""

from collections.abc import Sequence

from benchmarks.recording import INSTANCE, REQUEST, Recorder, Recording
from stream_monitor.config import CaptureSettings, MonitorSettings
from stream_monitor.monitor.calibration import Calibration
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.intake import Intake, Stream
from stream_monitor.monitor.merge import Merger
from stream_monitor.monitor.metrics import Metrics
from stream_monitor.monitor.pipeline import Pipeline
from stream_monitor.monitor.ranks import RankBook
from stream_monitor.monitor.store import TraceStore
from stream_monitor.monitor.text import Vocabularies
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.tracing.model import TracedModel
from stream_monitor.v1alpha1 import ingest_pb2


class Replay(Recorder):
    """Texts of one model through a monitor without a network."""

    def __init__(self, model: TracedModel, settings: CaptureSettings | None = None) -> None:
        super().__init__(model, settings)

    def run(
        self,
        ids: list[int],
        prompt_tokens: int,
        untrusted: Sequence[int] = (),
        calibration: Calibration | None = None,
    ) -> RequestTrace:
        """The trace of a request, finished; see `Recorder.record`."""
        return show(self.record(ids, prompt_tokens, untrusted), calibration)


def show(recording: Recording, calibration: Calibration | None = None) -> RequestTrace:
    """The trace that a monitor with these profiles, none unless given, makes of a recording."""
    settings = MonitorSettings()
    calibration = calibration or Calibration()
    ranks = RankBook(settings.max_engines)
    store = TraceStore(settings.max_traces, settings.max_trace_bytes, settings.max_sentences)
    log = EventLog(settings.event_log, settings.subscriber_queue, settings.max_subscribers)
    metrics = Metrics()
    pipeline = Pipeline(store, log, metrics, calibration, Vocabularies({}))
    # No limit of size or rate: a recording is taken in at once.
    intake = Intake(ranks, Merger(settings.merge_deadline_seconds), pipeline, metrics, 1 << 30, 1 << 40)
    stream = Stream()
    for message in recording:
        (answer,) = intake.take([message], stream)
        assert answer.outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED, answer
        intake.score()
    trace = store.get(INSTANCE, REQUEST)
    assert trace is not None
    assert trace.finished
    return trace
