"""Settings of the stream between monitors and a fleet."""

import os

from pydantic import Field, field_validator

from stream_monitor.addresses import check_broker
from stream_monitor.config.layers import MOST_DAYS, Layered


class OnStream(Layered):
    """The stream on NATS JetStream over which monitors and a fleet share findings and traces."""

    nats: str = Field(
        "",
        description="Brokers of the fleet's stream: nats://host:port or tls://host:port, several separated by commas. "
        "Empty: none. It needs the extra `fleet`.",
    )
    nats_stream: str = Field(
        "STREAM_MONITOR",
        pattern="^[A-Za-z0-9_-]{1,64}$",
        description="Name of the stream, with which its subjects begin; made if there is none.",
    )
    nats_credentials: str = Field(
        "",
        description="File with what the broker asks for: a `.creds` file, else one line `user:password` or a token.",
    )
    nats_ca: str = Field("", description="File with the certificates that the broker's is checked against.")
    nats_certificate: str = Field("", description="File with our certificate for the broker, where it asks for one.")
    nats_key: str = Field("", description="File with the certificate's key.")
    nats_days: float = Field(
        7.0,
        gt=0,
        le=MOST_DAYS,
        description="Days that a stream made here keeps its messages; one that is there keeps its own limits.",
    )
    nats_bytes: int = Field(1 << 33, ge=1 << 20, description="The same of its size; beyond it the oldest messages go.")
    nats_replicas: int = Field(1, ge=1, le=5, description="The same of its copies, on as many brokers of a cluster.")

    @field_validator("nats")
    @classmethod
    def _brokers(cls, value: str) -> str:
        return ",".join(check_broker(url.strip()) for url in value.split(",")) if value else value

    @field_validator("nats_credentials", "nats_ca", "nats_certificate", "nats_key")
    @classmethod
    def _file(cls, value: str) -> str:
        return os.path.expanduser(value)
