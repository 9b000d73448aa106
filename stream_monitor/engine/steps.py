"""A step as the runner thread hands it to the estimator thread."""

from dataclasses import dataclass, field

from stream_monitor.engine.device import StepSlot
from stream_monitor.records import Ledger, RequestFinished, RequestStarted, TokenRun


@dataclass
class Job:
    """What the estimator thread works on: a step's lifecycle entries, and its rows if any were sampled."""

    step: int
    wall_time_ns: int
    ledger: Ledger
    slot: StepSlot | None = None
    started: list[RequestStarted] = field(default_factory=list)
    tokens: list[TokenRun] = field(default_factory=list)
    finished: list[RequestFinished] = field(default_factory=list)
