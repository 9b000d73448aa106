"""Settings of the sidecar, `stream-monitor serve`."""

import os

from pydantic import Field, field_validator

from stream_monitor.addresses import check_address
from stream_monitor.config.layers import MOST_DAYS
from stream_monitor.config.listening import Answering
from stream_monitor.config.places import default_store, default_target
from stream_monitor.config.stream import OnStream


class MonitorSettings(OnStream, Answering):
    """How the sidecar listens, what it keeps and when it speaks up."""

    table = "monitor"

    ingest: str = Field(default_factory=default_target, description="Address for publishers: unix:/path or host:port.")
    profiles: str = Field(
        "", description="Files of `stream-monitor calibrate`, separated by commas; one per model and capture."
    )
    tokenizers: str = Field(
        "",
        description="Files `tokenizer.json`, or folders of models, with which token ids become text, separated by "
        "commas: NAME=PATH for a model as vLLM's metrics name it, PATH alone for all others. Text is shown to whoever "
        "can read traces. It needs `send_token_ids` in the engine, and the extra `text`.",
    )
    false_alarm_rate: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="Share of requests without cause in which any finding may be raised, where a profile says what "
        "those look like. Without a profile, thresholds are the detectors' own and the rate is not known.",
    )
    store: str = Field(
        default_factory=default_store,
        description="File that keeps findings and traces over restarts (SQLite, 0600). Empty: in memory only.",
    )
    store_days: float = Field(7.0, gt=0, le=MOST_DAYS, description="Days until findings and traces leave the store.")
    store_bytes: int = Field(
        1 << 30, ge=1 << 20, description="Size of the store; beyond it the oldest findings and traces go."
    )
    max_traces: int = Field(
        10_000,
        ge=1,
        description="Request traces in memory; the oldest finished ones of the engine that has most go first.",
    )
    max_trace_bytes: int = Field(
        1 << 30,
        ge=1 << 20,
        description="Memory of all traces, estimated; beyond it the oldest of the engine that takes most go.",
    )
    max_sentences: int = Field(4096, ge=16, description="Sentences per request; later ones are counted, not kept.")
    max_message_bytes: int = Field(4 << 20, ge=1 << 16, le=64 << 20, description="Largest summary taken in.")
    max_engines: int = Field(256, ge=1, description="Engine ranks at a time; others are refused.")
    max_message_rate: int = Field(
        5000,
        ge=1,
        description="Messages a second of one engine rank, over ten seconds; those beyond are refused, counted.",
    )
    max_ranks_per_engine: int = Field(
        128, ge=1, description="Of these, ranks of one engine: tensor x pipeline x data parallel; others are refused."
    )
    max_requests_per_engine: int = Field(
        4096, ge=1, description="Running requests of one engine that are followed at a time; others are refused."
    )
    merge_deadline_seconds: float = Field(
        2.0, gt=0, description="A step whose ranks have not all arrived by then is partial."
    )

    @field_validator("ingest")
    @classmethod
    def _ingest(cls, value: str) -> str:
        return check_address(value)

    @field_validator("store")
    @classmethod
    def _home(cls, value: str) -> str:
        return os.path.expanduser(value)
