"""Every setting of the product, its default and its meaning, in one place.

Values come, strongest first, from the command line, `STREAM_MONITOR_*` variables, and the TOML file that
`STREAM_MONITOR_CONFIG` names (tables `[capture]`, `[monitor]` and `[fleet]`). They are parsed once, at the edge; inner
code takes values, not settings objects.
"""

import os
import socket
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from stream_monitor.addresses import check_address, check_broker
from stream_monitor.target import Target, TargetError
from stream_monitor.tenants import check_tenant

PREFIX = "STREAM_MONITOR_"


class SettingsError(ValueError):
    """A setting cannot be used. The message is one line that names the key and what would be valid."""


def runtime_folder() -> Path:
    """Where sockets live unless told otherwise: `$XDG_RUNTIME_DIR/stream-monitor`, else a folder of this user's."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "stream-monitor" if base else Path(tempfile.gettempdir()) / f"stream-monitor-{os.getuid()}"


def default_target() -> str:
    """The Unix socket on which `stream-monitor serve` listens and to which publishers connect."""
    return f"unix:{runtime_folder() / 'ingest.sock'}"


def default_store() -> str:
    """Where `stream-monitor serve` keeps events and traces: the user's folder for state that outlives a restart."""
    base = os.environ.get("XDG_STATE_HOME")
    folder = Path(base) if base else Path(os.path.expanduser("~")) / ".local" / "state"
    return str(folder / "stream-monitor" / "monitor.db")


def default_fleet_store() -> str:
    """Where `stream-monitor fleet` keeps what it read of the stream."""
    return str(Path(default_store()).with_name("fleet.db"))


def _whole(value: object) -> object:
    """A number as a variable has it, as text: a `Literal` takes no text for a number."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


class _Layered(BaseSettings):
    """Command line over environment over file."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _FileTable(settings_cls)


class _FileTable(PydanticBaseSettingsSource):
    """The class's table of the file named by `STREAM_MONITOR_CONFIG`."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # pragma: no cover - unused by us
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        path = os.environ.get(PREFIX + "CONFIG")
        if not path:
            return {}
        try:
            content = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise SettingsError(f"{PREFIX}CONFIG: cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{PREFIX}CONFIG: {path} is not TOML: {error}") from None
        if unknown := sorted(set(content) - set(TABLES)):
            raise SettingsError(f"{path}: unknown table [{unknown[0]}]; valid: {', '.join(f'[{t}]' for t in TABLES)}")
        name = next(table for table, settings in TABLES.items() if settings is self.settings_cls)
        table = content.get(name, {})
        if not isinstance(table, dict):
            raise SettingsError(f"{path}: {name} is not a table; write [{name}] on a line of its own")
        return table


class CaptureSettings(_Layered):
    """What the plug-in captures inside the engine. The defaults are the table every published figure uses."""

    disable: bool = Field(False, description="1 makes the plug-in a no-op.")
    target: str = Field(
        default_factory=default_target,
        description="Address of the monitor: unix:/path or host:port. Beyond loopback it needs `target_ca`.",
    )
    target_ca: str = Field(
        "", description="File of the CAs by one of which the monitor's certificate is signed, or `system`: speak TLS."
    )
    target_certificate: str = Field("", description="File of the certificate that is shown to the monitor (mTLS).")
    target_key: str = Field("", description="File of its key.")
    target_token_file: str = Field(
        "", description="File of the bearer token that is shown to the monitor; read again for each connection."
    )
    target_insecure: bool = Field(False, description="Publish beyond loopback without TLS.")
    tenant: str = Field("", description="Tenant of all requests of this engine.")
    tenant_argument: str = Field(
        "",
        description="Name of the entry of `vllm_xargs` in which the gateway in front of vLLM says whose request it is. "
        "The gateway must set it in every request, over what the client sent.",
    )
    stride: int = Field(4, ge=1, le=4096, description="Capture one row in every `stride` positions of a request.")
    layers: str = Field(
        "auto",
        description="Layers to watch: auto, all, or a list such as 8,12,20-23. auto picks layers evenly over the upper "
        "two thirds of the model, as many as max_heads allows, at most 4.",
    )
    heads: str = Field("auto", description="Query heads to watch in each layer of a rank: auto, all, or a list.")
    max_heads: int = Field(32, ge=1, le=4096, description="Watched (layer, head) pairs per rank under auto.")
    strategy: Literal["beam", "descent", "exact"] = Field(
        "beam",
        description="How key blocks are searched: beam by summaries of the blocks, which take about 1/32 of the "
        "watched layers' KV cache; descent without, reading more of the keys; exact reads all of them.",
    )
    block_size: Annotated[Literal[8, 16, 32, 64, 128], BeforeValidator(_whole)] = Field(
        32, description="Tokens per key block."
    )
    top_k: int = Field(8, ge=1, le=4096, description="Key blocks kept per query head.")
    min_gain: float = Field(
        0.0005,
        ge=0,
        le=1,
        description="Under beam, a search reads on while the heads that share its reads expect to gain this part of "
        "their attention, summed, per block read. Less reads more and finds more; 0 reads 16 blocks per block kept.",
    )
    sink_blocks: int = Field(1, ge=0, le=16, description="First blocks, always kept.")
    recent_blocks: int = Field(2, ge=1, le=64, description="Last blocks, always kept.")
    max_requests: int = Field(
        256, ge=1, le=4096, description="Requests captured at a time; others are refused, counted."
    )
    audit_every: int = Field(
        64, ge=0, description="Recompute one (layer, head, row) exactly every so many captured steps; 0: never."
    )
    ring_bytes: int = Field(16 << 20, ge=1 << 16, le=1 << 32, description="Size of the shared-memory ring.")
    queue_steps: int = Field(
        4, ge=1, le=64, description="Captured steps that may wait for the estimator; more are dropped, counted."
    )
    max_overhead: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Part of the engine's time that capture may take on its runner thread, and the search where it has "
        "no CPU of its own. Above it the stride is doubled, to 64 times at most, and halved when there is room again; "
        "0: never.",
    )
    gpu_share: float = Field(
        0.125, gt=0, le=1, description="Part of a GPU's multiprocessors that a search may occupy beside the engine."
    )
    send_token_ids: bool = Field(
        False,
        description="Let token ids, and so text, leave the engine: those of the output, and of prompts up to 131,072 "
        "tokens.",
    )
    client_may_disable: bool = Field(
        False, description="Let a request switch its own monitoring off, by stream_monitor_disable in its vllm_xargs."
    )
    allow_untested_engine: bool = Field(
        False, description="Capture on a vLLM version this release was not tested with."
    )

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        return check_address(value)

    @field_validator("tenant")
    @classmethod
    def _tenant(cls, value: str) -> str:
        return check_tenant(value)

    def monitor(self) -> Target:
        """Where to publish, and how. Raises TargetError if the settings of `target` do not go together."""
        return Target(
            self.target,
            self.target_ca,
            self.target_certificate,
            self.target_key,
            self.target_token_file,
            self.target_insecure,
        )


class AccessSettings(_Layered):
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
    max_calls: int = Field(1024, ge=1, description="Calls of one gRPC method at a time, streams included.")
    max_connections: int = Field(1024, ge=1, description="Connections to each address at a time.")

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


class OnStream(_Layered):
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


class MonitorSettings(OnStream, Answering):
    """How the sidecar listens, what it keeps and when it speaks up."""

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
    store_days: float = Field(7.0, gt=0, description="Days until findings and traces leave the store.")
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


class FleetSettings(OnStream, Answering):
    """One of the interchangeable processes that answer for all monitors of a stream."""

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


TABLES: dict[str, type[_Layered]] = {
    "capture": CaptureSettings,
    "monitor": MonitorSettings,
    "fleet": FleetSettings,
}


def listed(table: type[_Layered]) -> list[tuple[str, FieldInfo]]:
    """The settings of a table as people should read them: its own first, then those of every process that listens."""
    shared = AccessSettings.model_fields
    return sorted(table.model_fields.items(), key=lambda item: item[0] in shared)


S = TypeVar("S", bound=_Layered)


def load(table: type[S], **overrides: Any) -> S:
    """Settings of one table; raises SettingsError with one line that names the key and what is valid."""
    _refuse_unknown_variables()
    try:
        found = table(**{key: value for key, value in overrides.items() if value is not None})
        if isinstance(found, CaptureSettings):
            found.monitor()
    except ValidationError as error:
        raise SettingsError(_one_line(table, error)) from None
    except TargetError as error:
        raise SettingsError(
            f"target: {error} (settings target_ca, target_certificate, target_key, target_token_file, target_insecure)"
        ) from None
    return found


def _refuse_unknown_variables() -> None:
    known = {PREFIX + field.upper() for table in TABLES.values() for field in table.model_fields} | {PREFIX + "CONFIG"}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            raise SettingsError(f"{name}: no such setting; valid: {', '.join(sorted(known))}")


def _one_line(table: type[_Layered], error: ValidationError) -> str:
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else "settings"
    if first["type"] == "extra_forbidden":
        return f"{key}: no such setting; valid: {', '.join(sorted(table.model_fields))}"
    # What was given for a broker may hold a secret.
    given = "" if key == "nats" else f" (got {first.get('input')!r})"
    return f"{key}: {first['msg']}{given}; {table.model_fields[key].description}"
