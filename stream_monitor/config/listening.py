"""Settings of every process that listens: who may do what, where subscribers and browsers are answered."""

from pydantic import Field, field_validator

from stream_monitor.addresses import check_address
from stream_monitor.config.layers import Layered


class AccessSettings(Layered):
    """Who may do what, and how much of it: of every process that listens."""

    insecure: bool = Field(False, description="Listen beyond loopback without TLS.")
    tls_certificate: str = Field(
        "", description="File of the certificate chain (PEM): gRPC and HTTP speak TLS, except on Unix sockets."
    )
    tls_key: str = Field("", description="File of its key. Both are read again when they are replaced.")
    tls_client_ca: str = Field(
        "",
        description="File of the CAs of client certificates: gRPC demands one, HTTP takes one in the place of a token.",
    )
    access: str = Field(
        "",
        description="File that says who may publish, subscribe, read text, delete and scrape, for which tenant "
        "(docs/security.md); read again when it changes. Empty: whoever connects may do everything.",
    )
    socket_uids: str = Field(
        "",
        description="User ids that may connect to Unix sockets, separated by commas. Empty: the user of this process, "
        "root, and members of the socket's group.",
    )
    metrics: str = Field(
        "", description="Another address for /metrics alone, such as 0.0.0.0:9753, so that the page need not be open."
    )
    metrics_insecure: bool = Field(
        False,
        description="Serve `metrics` without TLS, beyond loopback too. No traces; exemplars are ids of requests.",
    )
    max_calls: int = Field(1024, ge=1, le=1 << 20, description="Calls of one gRPC method at a time, streams included.")
    max_connections: int = Field(1024, ge=1, le=1 << 20, description="Connections to each address at a time.")

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, value: str) -> str:
        return check_address(value) if value else value

    @field_validator("socket_uids")
    @classmethod
    def _uids(cls, value: str) -> str:
        if not all(each.strip().isdigit() for each in value.split(",")) and value:
            raise ValueError("must be numbers, separated by commas")
        return value


class Answering(AccessSettings):
    """Where subscribers and browsers are answered: by a monitor, or by a process of a fleet."""

    grpc: str = Field(
        "127.0.0.1:9750",
        description="Address for subscribers: host:port or unix:/path. It may be the same as ingest.",
    )
    http: str = Field("127.0.0.1:9751", description="Address of the page, /metrics, /healthz and /readyz: host:port.")
    http_hosts: str = Field(
        "",
        description="Host names by which browsers may ask for the page, separated by commas, beside localhost and "
        "plain addresses: a name that is not known here could be another site's, pointed at this monitor.",
    )
    max_live_pages: int = Field(32, ge=1, description="Pages that are shown live at a time; each is a subscriber.")
    max_subscribers: int = Field(256, ge=1, description="Subscribers at a time.")
    max_principal_subscribers: int = Field(
        64, ge=1, description="Subscribers at a time that show the same credential; where `access` is set."
    )
    subscriber_queue: int = Field(
        1024, ge=1, description="Events that wait for a slow subscriber; then the oldest are lost, counted."
    )
    event_log: int = Field(
        65_536, ge=1, description="Findings in memory for subscribers that resume; older ones are read from the store."
    )
    shutdown_grace_seconds: float = Field(
        3.0, ge=0, description="Time calls get to end after NOT_SERVING was announced."
    )

    @field_validator("grpc", "http")
    @classmethod
    def _addresses(cls, value: str) -> str:
        return check_address(value)
