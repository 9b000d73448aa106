"""Where the monitor is, how calls are made, and errors a person can read."""

from typing import Any, NoReturn

import grpc

from stream_monitor.v1alpha1 import monitor_pb2

DEADLINE_SECONDS = 30.0
"""Of a call that answers once; a deletion may take as long."""
PAGE = 1000
"""Requests asked for at a time."""
OPTIONS: list[tuple[str, Any]] = [
    # A trace of a long context is larger than gRPC's own limit.
    ("grpc.max_receive_message_length", -1),
    # A subscription may be silent for hours: this is how a connection that died in silence is noticed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class MonitorError(Exception):
    """The monitor cannot be reached, or refused. One line.

    Attributes:
        code: gRPC status, such as NOT_FOUND; `monitor.proto` says which call ends with which.
    """

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.code = code


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes along with every call."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def refuse(target: str, error: grpc.RpcError) -> NoReturn:
    """Raises MonitorError for what a call raised."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and ("connect" in details or not details):
        raise MonitorError(f"no monitor at {target}; start one with `stream-monitor serve`", code) from error
    raise MonitorError(f"the monitor at {target} refused: {details or code.name}", code) from error


def trace_request(
    request_id: str, engine_instance: str, sample_index: int | None, with_heads: bool
) -> monitor_pb2.GetTraceRequest:
    """The message of `get_trace`."""
    return monitor_pb2.GetTraceRequest(
        request_id=request_id, engine_instance=engine_instance, sample_index=sample_index, with_heads=with_heads
    )


def list_request(
    request_id: str, model_name: str, engine: str, page_size: int, token: str
) -> monitor_pb2.ListRequestsRequest:
    """The message of one page of `list_requests`."""
    return monitor_pb2.ListRequestsRequest(
        request_id=request_id, model_name=model_name, engine=engine, page_size=page_size, page_token=token
    )


def delete_request(
    request_id: str, engine_instance: str, sample_index: int | None, every: bool
) -> monitor_pb2.DeleteRequestRequest:
    """The message of `delete_request`."""
    return monitor_pb2.DeleteRequestRequest(
        request_id=request_id, engine_instance=engine_instance, sample_index=sample_index, all=every
    )
