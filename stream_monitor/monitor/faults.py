"""What is wrong with a message, with its gRPC status and the name it is counted under."""

import grpc


class Fault(Exception):
    """A message breaks the contract; the stream it came on ends.

    Attributes:
        status: the gRPC status `ingest.proto` names for this fault.
        reason: closed set, lower snake case; the `reason` label of `stream_monitor_messages_total`.
    """

    def __init__(self, status: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


def invalid(reason: str, message: str) -> Fault:
    """A fault of the content: INVALID_ARGUMENT."""
    return Fault(grpc.StatusCode.INVALID_ARGUMENT, reason, message)


class Refusal(Exception):
    """A sound message that is not taken in; the stream goes on. `reason` as in PublishResponse.reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
