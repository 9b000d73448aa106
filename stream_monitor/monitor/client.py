"""What the commands that ask a running monitor share: a channel, and errors a person can read."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc

DEADLINE_SECONDS = 30.0
_PAGE = 1000


class MonitorError(Exception):
    """The monitor cannot be reached, or refused; one line."""


@contextmanager
def asking(target: str) -> Iterator[monitor_pb2_grpc.MonitorServiceStub]:
    """The service at an address. Raises MonitorError for whatever a call raises."""
    with grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)]) as channel:
        try:
            yield monitor_pb2_grpc.MonitorServiceStub(channel)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise MonitorError(f"no monitor at {target}; start one with `stream-monitor serve`") from error
            raise MonitorError(f"the monitor at {target} refused: {error.details()}") from error


def all_requests(
    service: monitor_pb2_grpc.MonitorServiceStub, model_name: str = ""
) -> Iterator[monitor_pb2.RequestInfo]:
    """Every request it holds, newest first, page by page."""
    token = ""
    while True:
        asked = monitor_pb2.ListRequestsRequest(model_name=model_name, page_size=_PAGE, page_token=token)
        response = service.ListRequests(asked, timeout=DEADLINE_SECONDS)
        yield from response.requests
        token = response.next_page_token
        if not token:
            return
