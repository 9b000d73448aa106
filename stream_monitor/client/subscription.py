"""A subscription that outlives its connection: what to ask for next, how long to wait, and what was missed."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from stream_monitor.client.connection import refuse
from stream_monitor.v1alpha1 import monitor_pb2

FIRST_SECONDS, LONGEST_SECONDS = 0.2, 5.0
"""Waits before trying again: doubled each time, half of each drawn at random."""
FINAL = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)
"""Answers that trying again does not change."""
KINDS = {name.removeprefix("EVENT_KIND_").lower(): number for name, number in monitor_pb2.EventKind.items() if number}
SEVERITIES = {name.removeprefix("SEVERITY_").lower(): number for name, number in monitor_pb2.Severity.items() if number}

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Received:
    """An event, and what was missed before it.

    Attributes:
        event: of `monitor.proto`.
        cursor: hand it to a later `subscribe` to go on after this event.
        lost: events before this one that the monitor had and could not deliver: this subscriber read too slowly, or
            they could not be stored.
        gap: empty, or why any number of events before this one may be missing: the monitor no longer knew the cursor,
            and went on from the oldest event it holds.
    """

    event: monitor_pb2.Event
    cursor: str
    lost: int
    gap: str


def kind_numbers(names: Sequence[str]) -> list[monitor_pb2.EventKind.ValueType]:
    """Event kinds by name, such as `anchor_shift`, in any case. Raises ValueError that lists the valid ones."""
    return [_number(name, KINDS, "kind") for name in names]  # type: ignore[misc]


def _number(name: str, numbers: Mapping[str, int], what: str) -> int:
    try:
        return numbers[name.lower().replace("-", "_")]
    except KeyError:
        raise ValueError(f"no such {what} {name!r}; valid: {', '.join(numbers)}") from None


class Subscription:
    """Says what to ask for, is told what comes, and decides what to do about a failure."""

    def __init__(
        self,
        target: str,
        model_names: Sequence[str],
        engines: Sequence[str],
        request_ids: Sequence[str],
        kinds: Sequence[str],
        minimum_severity: str,
        cursor: str,
        last: int,
        notify: Notify | None,
    ) -> None:
        self._target = target
        self._notify = notify or (lambda _: None)
        self._attempt = 0
        self._gap = ""
        self._lost = 0
        self.request = monitor_pb2.SubscribeRequest(
            model_names=model_names,
            engines=engines,
            request_ids=request_ids,
            kinds=kind_numbers(kinds),
            cursor=cursor,
            last=last,
        )
        if minimum_severity:
            self.request.minimum_severity = _number(minimum_severity, SEVERITIES, "severity")  # type: ignore[assignment]

    def heard(self, response: monitor_pb2.SubscribeResponse) -> Received | None:
        """What there is to hand on; None for the response that only confirms the subscription."""
        self._attempt = 0
        self.request.cursor, self.request.last = response.cursor, 0
        self._lost += response.lost
        if not response.HasField("event"):
            return None
        received = Received(response.event, response.cursor, self._lost, self._gap)
        self._lost, self._gap = 0, ""
        return received

    def failed(self, error: grpc.RpcError, renewed: bool) -> float:
        """Seconds to wait before asking again. Raises MonitorError if that is of no use.

        `renewed` says that what is shown to the monitor is another credential by now.
        """
        if error.code() in FINAL and not (renewed and error.code() is grpc.StatusCode.UNAUTHENTICATED):
            refuse(self._target, error)
        if error.code() is grpc.StatusCode.OUT_OF_RANGE:
            metadata: Any = error.trailing_metadata() or ()
            oldest = str(dict(metadata).get("oldest-cursor", ""))
            # Twice the same: it was let go meanwhile, and whatever is held by now is good enough.
            self.request.cursor = "" if oldest == self.request.cursor else oldest
            self._gap = error.details() or "the cursor holds no longer"
            self._notify(f"{self._gap}; going on from there, events before it are missing")
            return 0.0
        if self._attempt == 0:
            self._notify(f"no answer from the monitor at {self._target} ({error.details()}); trying again")
        return self.ended()

    def ended(self) -> float:
        """Seconds to wait after the monitor ended the subscription."""
        longest: float = min(LONGEST_SECONDS, FIRST_SECONDS * 2 ** min(self._attempt, 16))
        self._attempt += 1
        return longest * random.uniform(0.5, 1.0)
