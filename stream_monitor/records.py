"""What one engine step leaves in the shared-memory ring: msgpack structs, decoded by the publisher of the same install.

The wire contract is `protos/`; these mirror `summary.proto` field for field (arrays as little-endian packed bytes of
the shapes given there), so that the worker process never imports protobuf or grpc.
"""

import enum

import msgspec


class Phase(enum.IntEnum):
    """`summary.proto` Phase."""

    PREFILL_CHUNK = 1
    PREFILL_END = 2
    DECODE = 3


class Role(enum.IntEnum):
    """`summary.proto` Role."""

    SYSTEM = 1
    USER = 2
    UNTRUSTED = 3
    REASONING = 4
    ANSWER = 5
    ASSISTANT = 6


class TokenFlag(enum.IntFlag):
    """`summary.proto` TokenRun.flags, one byte a token."""

    ENDS_TERMINATOR = 1
    BEGINS_SPACE = 2
    BREAKS_INSIDE = 4
    ENDS_NEWLINE = 8
    OPENS_REASONING = 16
    CLOSES_REASONING = 32
    SPECIAL = 64
    BEGINS_NEWLINE = 128


class Geometry(msgspec.Struct, frozen=True):
    """`summary.proto` BlockGeometry."""

    block_size: int
    top_k: int
    sink_blocks: int
    recent_blocks: int
    strategy: str


class EngineInfo(msgspec.Struct, frozen=True):
    """`summary.proto` EngineInfo; constant for the life of one worker, handed to the publisher when it starts."""

    instance: str
    model_name: str
    engine: str
    data_parallel_index: int
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_parallel_rank: int
    pipeline_parallel_size: int
    layers: list[int]
    first_query_head: int
    total_query_heads: int
    query_heads: list[int]
    geometry: Geometry
    vllm_version: str
    plugin_version: str
    summary_bytes: int = 0
    kv_tokens_lost: int = 0
    tenant: str = ""
    tenants_by_request: bool = False

    @property
    def heads_per_row(self) -> int:
        """Watched (layer, query head) pairs of this rank: what one row counts in the ledger."""
        return len(self.layers) * len(self.query_heads)


class Rows(msgspec.Struct):
    """`summary.proto` Rows, R = len(request_ids)."""

    request_ids: list[str]
    positions: bytes
    attempts: bytes
    phases: bytes
    block_ids: bytes
    block_log_share: bytes
    block_strongest: bytes
    forced_log_share: bytes
    forced_strongest: bytes
    unobserved_log_share: bytes
    total_lse: bytes
    keys_read: bytes
    learned_sink_log_share: bytes = b""
    narrow_block_ids: bytes = b""


class RequestStarted(msgspec.Struct):
    """`summary.proto` RequestStarted."""

    request_id: str
    prompt_tokens: int
    role_starts: bytes
    roles: bytes
    prompt_flags: bytes
    prompt_token_ids: bytes = b""
    refused_reason: str = ""
    tenant: str = ""


class TokenRun(msgspec.Struct):
    """`summary.proto` TokenRun."""

    request_id: str
    first_position: int
    flags: bytes
    token_ids: bytes = b""


class RequestFinished(msgspec.Struct):
    """`summary.proto` RequestFinished."""

    request_id: str
    total_tokens: int


class RowLedger(msgspec.Struct):
    """Cumulative row counts of one class of rows (tokens or chunks), in rows x layers x heads.

    Once nothing is in flight, expected = captured + sampled_out + raced + sum(dropped) + sum(refused) + sum(discarded).
    `governed` are those sampled out by the governor, in the sum too. In the ring `captured` counts what was written to
    it; the publisher replaces that by what the monitor acknowledged.
    """

    expected: int = 0
    captured: int = 0
    sampled_out: int = 0
    governed: int = 0
    raced: int = 0
    dropped: dict[str, int] = {}
    refused: dict[str, int] = {}
    discarded: dict[str, int] = {}


class QueueState(msgspec.Struct):
    """`summary.proto` QueueState."""

    name: str
    size: int
    capacity: int


class Ledger(msgspec.Struct):
    """`summary.proto` Ledger."""

    token_rows: RowLedger = msgspec.field(default_factory=RowLedger)
    chunk_rows: RowLedger = msgspec.field(default_factory=RowLedger)
    estimates: int = 0
    estimate_seconds: float = 0.0
    fault: str = ""
    refused_arguments: dict[str, int] = {}
    key_bytes: int = 0
    record_bytes: int = 0
    sent: int = 0
    queues: list[QueueState] = []
    hook_seconds: float = 0.0
    stride: int = 0
    device_waits: int = 0


class Audit(msgspec.Struct):
    """`summary.proto` Audit."""

    row: int
    layer: int
    query_head: int
    recall: float
    unobserved_error: float


class StepRecord(msgspec.Struct):
    """One record of the ring. `rows` is None in a record that only carries tokens, lifecycle or the ledger; `more` says
    that other records have more rows of the step."""

    step: int
    wall_time_ns: int
    ledger: Ledger
    rows: Rows | None = None
    started: list[RequestStarted] = []
    tokens: list[TokenRun] = []
    finished: list[RequestFinished] = []
    audits: list[Audit] = []
    more: bool = False


encode = msgspec.msgpack.Encoder().encode
"""StepRecord -> bytes."""
decode = msgspec.msgpack.Decoder(StepRecord).decode
"""bytes -> StepRecord; raises msgspec.DecodeError or msgspec.ValidationError."""
