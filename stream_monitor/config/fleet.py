"""Settings of one process of a fleet, `stream-monitor fleet`."""

import os
import socket

from pydantic import Field, field_validator

from stream_monitor.config.listening import Answering
from stream_monitor.config.places import default_fleet_store
from stream_monitor.config.stream import OnStream


class FleetSettings(OnStream, Answering):
    """One of the interchangeable processes that answer for all monitors of a stream."""

    table = "fleet"

    nats: str = Field(
        "",
        validate_default=True,
        description="Brokers of the fleet's stream: nats://host:port or tls://host:port, several separated by commas.",
    )
    fleet_name: str = Field(
        default_factory=socket.gethostname,
        pattern="^[A-Za-z0-9._-]{1,128}$",
        description="Names this process and its durable consumer to the broker; no two of a fleet may share it.",
    )
    fleet_store: str = Field(
        default_factory=default_fleet_store,
        description="File in which this process keeps what it read of the stream (SQLite, 0600). It holds what the "
        "stream holds, is read anew from there if it is lost, and no two processes may share it.",
    )

    @field_validator("nats")
    @classmethod
    def _needed(cls, value: str) -> str:
        if not value:
            raise ValueError("a fleet reads from a broker: nats://host:port or tls://host:port")
        return value

    @field_validator("fleet_store")
    @classmethod
    def _home(cls, value: str) -> str:
        if not value:
            raise ValueError("must be a file")
        return os.path.expanduser(value)
