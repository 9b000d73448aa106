"""Where the monitor is, how calls are made, and errors a person can read."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

import grpc

from stream_monitor.addresses import is_local
from stream_monitor.replaced import Mark
from stream_monitor.target import Target, TargetError
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


Channel = TypeVar("Channel")


class MonitorError(Exception):
    """The monitor cannot be reached, or refused. One line.

    Attributes:
        code: gRPC status, such as NOT_FOUND; `monitor.proto` says which call ends with which.
    """

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.code = code


class Link(Generic[Channel]):
    """The connection to a monitor; a new one after certificates were replaced.

    Args:
        target: address, or more about the monitor.
        credentials: of a TLS connection, where they are not in files.
        token: bearer token, where it is not in a file.
        insecure, secure: make a channel, of grpc or grpc.aio.

    Raises:
        TargetError: the monitor would be spoken to in the clear beyond this host, or a file cannot be read.
    """

    def __init__(
        self,
        target: str | Target,
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
        insecure: Callable[..., Channel],
        secure: Callable[..., Channel],
    ) -> None:
        if isinstance(target, str):
            target = Target(target, insecure=credentials is not None)
        if token and credentials is None and not target.ca and not is_local(target.address):
            raise TargetError(f"{target.address} is beyond this host: a token is not sent there in the clear")
        self.target = target
        self._credentials, self._token = credentials, token
        self._insecure, self._secure = insecure, secure
        self._lock = threading.Lock()
        self._mark: Mark = ()
        # Calls on an earlier one go on; four rotations later nothing does.
        self.channels: deque[Channel] = deque(maxlen=4)
        self.channel()

    def channel(self) -> Channel:
        """The channel for the next call."""
        with self._lock:
            mark = self.target.mark()
            if not self.channels or mark != self._mark:
                credentials = self._credentials or self.target.credentials()
                address = self.target.address
                self.channels.append(
                    self._insecure(address, OPTIONS)
                    if credentials is None
                    else self._secure(address, credentials, OPTIONS)
                )
                self._mark = mark
            return self.channels[-1]

    def renewed(self) -> bool:
        """Whether certificates or the token were replaced since the last call."""
        return self.target.mark() != self._mark

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with the next call."""
        return (("authorization", f"Bearer {self._token}"),) if self._token else self.target.metadata()


def refuse(target: str, error: grpc.RpcError) -> NoReturn:
    """Raises MonitorError for what a call raised."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "handshake failed" in details.lower():
        raise MonitorError(f"no TLS with {target}: {details}", code) from error
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
