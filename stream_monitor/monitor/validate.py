"""Bytes from a publisher -> a StepSummary that keeps the contract of `summary.proto`, or a named Fault."""

import re
import uuid
from itertools import pairwise

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from stream_monitor.monitor.faults import Fault, invalid
from stream_monitor.tenants import check_tenant
from stream_monitor.v1alpha1 import ingest_pb2, summary_pb2

SCHEMA_VERSIONS = (1, 2)
"""N - 1 and N."""
MAX_NAME = 256
MAX_ID = 1024
MAX_RANKS = 4096
MAX_POSITION = 1 << 28
"""Far beyond any context length; keeps hostile positions from becoming sizes."""
MAX_LEDGER_CELLS = 64
MAX_QUEUES = 16

OUTCOMES = ("expected", "sampled_out", "captured", "dropped", "raced", "refused", "discarded")
_REASON = re.compile(r"[a-z0-9_]{0,64}")


def parse(raw: bytes, max_bytes: int) -> summary_pb2.StepSummary:
    """The summary inside the bytes of a PublishRequest, checked as far as one message alone can be."""
    if len(raw) > max_bytes:
        raise Fault(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "oversized",
            f"message of {len(raw)} bytes; the limit is {max_bytes} (setting max_message_bytes)",
        )
    try:
        request = ingest_pb2.PublishRequest.FromString(raw)
    except DecodeError:
        raise invalid("malformed", "not a PublishRequest") from None
    if not request.HasField("summary"):
        raise invalid("malformed", "summary is missing")
    summary = request.summary
    if summary.schema_version not in SCHEMA_VERSIONS:
        raise Fault(
            grpc.StatusCode.FAILED_PRECONDITION,
            "schema_version",
            f"schema_version is {summary.schema_version}; supported: {', '.join(map(str, SCHEMA_VERSIONS))}",
        )
    if not summary.sequence:
        raise invalid("value", "sequence is missing; it counts from 1")
    _check_lifecycle(summary)
    _check_ledger(summary.ledger)
    return summary


def check_engine(engine: summary_pb2.EngineInfo) -> None:
    """Raise a Fault unless the rank describes itself soundly. Constant for a rank's life, so done once for each."""
    try:
        uuid.UUID(engine.instance)
    except ValueError:
        raise invalid("engine", "engine.instance is not a UUID") from None
    if len(engine.instance) != 36:
        raise invalid("engine", "engine.instance is not a UUID of 36 characters")
    if not engine.model_name or len(engine.model_name) > MAX_NAME:
        raise invalid("engine", f"engine.model_name must have 1 to {MAX_NAME} characters")
    if len(engine.engine) > MAX_NAME:
        raise invalid("engine", f"engine.engine must have at most {MAX_NAME} characters")
    _check_tenant(engine.tenant, "engine")
    for name, rank, size in (
        ("tensor_parallel", engine.tensor_parallel_rank, engine.tensor_parallel_size),
        ("pipeline_parallel", engine.pipeline_parallel_rank, engine.pipeline_parallel_size),
    ):
        if not rank < size <= MAX_RANKS:
            raise invalid(
                "engine", f"engine.{name}_rank is {rank} of {size}; must be below the size, at most {MAX_RANKS}"
            )
    if engine.tensor_parallel_size * engine.pipeline_parallel_size > MAX_RANKS:
        raise invalid("engine", f"more than {MAX_RANKS} ranks")
    for name, indices in (("layers", engine.layers), ("query_heads", engine.query_heads)):
        if any(b <= a for a, b in pairwise(indices)):
            raise invalid("engine", f"engine.{name} must ascend")
    if engine.query_heads and engine.first_query_head + engine.query_heads[-1] >= engine.total_query_heads:
        raise invalid("engine", f"engine.query_heads reach beyond total_query_heads {engine.total_query_heads}")
    _check_geometry(engine.geometry)


def _check_geometry(geometry: summary_pb2.BlockGeometry) -> None:
    limits = {"block_size": (1, 256), "top_k": (0, 4096), "sink_blocks": (0, 64), "recent_blocks": (1, 256)}
    for name, (low, high) in limits.items():
        value = getattr(geometry, name)
        if not low <= value <= high:
            raise invalid("engine", f"engine.geometry.{name} is {value}; must be {low} to {high}")


def _check_lifecycle(summary: summary_pb2.StepSummary) -> None:
    for started in summary.started:
        _check_id(started.request_id, "started")
        tokens = started.prompt_tokens
        if tokens > MAX_POSITION:
            raise invalid("limit", f"started.prompt_tokens is {tokens}; at most {MAX_POSITION}")
        # Ranks without a tokenizer, and requests that are not captured, come without flags.
        if len(started.prompt_flags) not in (0, tokens):
            raise invalid("shape", f"started.prompt_flags has {len(started.prompt_flags)} bytes for {tokens} tokens")
        if len(started.prompt_token_ids) not in (0, 4 * tokens):
            raise invalid(
                "shape", f"started.prompt_token_ids has {len(started.prompt_token_ids)} bytes, not 0 or 4 each"
            )
        if len(started.role_starts) != 4 * len(started.roles):
            raise invalid("shape", f"started.role_starts has {len(started.role_starts)} bytes, not 4 for each of roles")
        _check_roles(np.frombuffer(started.role_starts, "<u4"), np.frombuffer(started.roles, np.uint8), tokens)
        _check_tenant(started.tenant, "started")
        if len(started.refused_reason) > MAX_NAME:
            raise invalid("limit", f"started.refused_reason must have at most {MAX_NAME} characters")
    for run in summary.tokens:
        _check_id(run.request_id, "tokens")
        if run.first_position + len(run.flags) > MAX_POSITION:
            raise invalid(
                "limit", f"tokens reach position {run.first_position + len(run.flags)}; at most {MAX_POSITION}"
            )
        if len(run.token_ids) not in (0, 4 * len(run.flags)):
            raise invalid("shape", f"tokens.token_ids has {len(run.token_ids)} bytes, not 0 or 4 for each of flags")
    for finished in summary.finished:
        _check_id(finished.request_id, "finished")
        if finished.total_tokens > MAX_POSITION:
            raise invalid("limit", f"finished.total_tokens is {finished.total_tokens}; at most {MAX_POSITION}")


def _check_roles(starts: np.ndarray[tuple[int], np.dtype[np.uint32]], roles: bytes | np.ndarray, tokens: int) -> None:
    if not len(starts):
        return
    if starts[0] != 0 or np.any(starts[1:] <= starts[:-1]) or (starts[-1] >= tokens and tokens):
        raise invalid("value", "started.role_starts must ascend from 0 and stay inside the prompt")
    if not all(role in summary_pb2.Role.values() for role in roles):
        raise invalid("value", "started.roles has an unknown Role")


def _check_id(request_id: str, where: str) -> None:
    if not request_id or len(request_id) > MAX_ID:
        raise invalid("value", f"{where}: request_id must have 1 to {MAX_ID} characters")


def _check_tenant(tenant: str, where: str) -> None:
    try:
        check_tenant(tenant)
    except ValueError as error:
        raise invalid("value", f"{where}.tenant {error}") from None


def _check_ledger(ledger: summary_pb2.Ledger) -> None:
    for cells in (ledger.token_rows, ledger.chunk_rows):
        if len(cells) > MAX_LEDGER_CELLS:
            raise invalid("limit", f"ledger: more than {MAX_LEDGER_CELLS} cells")
        for cell in cells:
            if cell.outcome not in OUTCOMES:
                raise invalid("value", f"ledger: unknown outcome; valid: {', '.join(OUTCOMES)}")
            if not _REASON.fullmatch(cell.reason):
                raise invalid("value", "ledger: a reason is lower snake case of at most 64 characters")
        if len({(cell.outcome, cell.reason) for cell in cells}) != len(cells):
            raise invalid("value", "ledger: two cells of one outcome and reason")
    if not ledger.estimate_seconds >= 0:
        raise invalid("value", "ledger.estimate_seconds must be a number from 0")
    if not ledger.hook_seconds >= 0:
        raise invalid("value", "ledger.hook_seconds must be a number from 0")
    if len(ledger.refused_arguments) > MAX_LEDGER_CELLS:
        raise invalid("limit", f"ledger: more than {MAX_LEDGER_CELLS} refused arguments")
    for key in ledger.refused_arguments:
        name, _, reason = key.partition(":")
        if not (name and reason and _REASON.fullmatch(name) and _REASON.fullmatch(reason)):
            raise invalid("value", "ledger: a refused argument is name:reason in lower snake case")
    if len({queue.name for queue in ledger.queues}) != len(ledger.queues) or len(ledger.queues) > MAX_QUEUES:
        raise invalid("limit", f"ledger.queues has more than {MAX_QUEUES} entries, or two of one name")
    if len(ledger.fault) > MAX_ID:
        raise invalid("limit", f"ledger.fault must have at most {MAX_ID} characters")
