"""MonitorService: events to subscribers, traces and lists to whoever asks."""

import base64
import binascii
from collections.abc import AsyncIterator
from typing import Any

import grpc

from stream_monitor.monitor import views
from stream_monitor.monitor.events import (
    FINDINGS,
    CursorGone,
    CursorMalformed,
    EventLog,
    TooManySubscribers,
    Wanted,
)
from stream_monitor.monitor.store import TraceStore
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc

SERVICE = monitor_pb2.DESCRIPTOR.services_by_name["MonitorService"].full_name
DEFAULT_PAGE, MAX_PAGE = 100, 1000
MAX_LAST = 1000
"""Findings that a subscription may ask for from before it began."""
MAX_FILTER = 1000
"""Entries of each filter list of a subscription."""

Context = grpc.aio.ServicerContext[Any, Any]


class MonitorService(monitor_pb2_grpc.MonitorServiceServicer):
    """Reads the store and the event log; writes nothing."""

    def __init__(self, store: TraceStore, log: EventLog) -> None:
        self.store = store
        self.log = log

    async def Subscribe(
        self, request: monitor_pb2.SubscribeRequest, context: Context
    ) -> AsyncIterator[monitor_pb2.SubscribeResponse]:
        """Stream events; see `monitor.proto`."""
        for name in ("model_names", "engines", "request_ids", "kinds"):
            if len(getattr(request, name)) > MAX_FILTER:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{name} has more than {MAX_FILTER} entries")
        if request.last > MAX_LAST:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"last is {request.last}; at most {MAX_LAST}")
        try:
            subscriber, cursor = self.log.subscribe(wanted(request), request.cursor, request.last)
        except CursorGone as error:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, str(error))
        except CursorMalformed as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TooManySubscribers as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        try:
            yield monitor_pb2.SubscribeResponse(cursor=cursor)
            while (waiting := await subscriber.next()) is not None:
                sequence, event, lost = waiting
                yield monitor_pb2.SubscribeResponse(event=event, cursor=self.log.cursor(sequence), lost=lost)
        finally:
            self.log.subscribers.discard(subscriber)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the monitor is stopping")

    async def GetTrace(self, request: monitor_pb2.GetTraceRequest, context: Context) -> monitor_pb2.GetTraceResponse:
        """One request's trace; see `monitor.proto`."""
        found = [trace for trace in self.store.find(request.request_id) if _narrowed(trace, request)]
        if not found:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no trace of request {request.request_id!r}: unknown or evicted"
            )
        if len(found) > 1:
            keys = "; ".join(
                f"engine_instance={trace.instance} request_id={trace.request_id} "
                f"sample_index={trace.identity.sample_index}"
                for trace in found[:20]
            )
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"{len(found)} traces carry {request.request_id!r}: {keys}"
            )
        return views.full(found[0], request.with_heads)

    async def ListRequests(
        self, request: monitor_pb2.ListRequestsRequest, context: Context
    ) -> monitor_pb2.ListRequestsResponse:
        """Requests held, newest first; see `monitor.proto`."""
        if request.page_size > MAX_PAGE:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"page_size is {request.page_size}; at most {MAX_PAGE}"
            )
        before = None
        if request.page_token:
            try:
                before = int(base64.urlsafe_b64decode(request.page_token.encode()))
            except (binascii.Error, ValueError):
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, "page_token is not one that this service gave out"
                )
        size = request.page_size or DEFAULT_PAGE
        response = monitor_pb2.ListRequestsResponse()
        traces = self.store.find(request.request_id) if request.request_id else self.store.newest_first()
        last = 0
        for trace in traces:
            if before is not None and trace.serial >= before:
                continue
            model_name, engine = trace.labels
            if request.model_name not in ("", model_name) or request.engine not in ("", engine):
                continue
            if len(response.requests) == size:
                response.next_page_token = base64.urlsafe_b64encode(str(last).encode()).decode()
                break
            response.requests.append(views.info(trace))
            last = trace.serial
        return response


def wanted(request: monitor_pb2.SubscribeRequest) -> Wanted:
    """The subscription's filters as one test."""
    models, engines = frozenset(request.model_names), frozenset(request.engines)
    ids = frozenset(request.request_ids)
    kinds = frozenset(request.kinds) or FINDINGS
    minimum = request.minimum_severity

    def test(event: monitor_pb2.Event) -> bool:
        return (
            event.kind in kinds
            and event.severity >= minimum
            and (not models or event.model_name in models)
            and (not engines or event.engine in engines)
            and (not ids or not ids.isdisjoint(views.event_ids(event)))
        )

    return test


def _narrowed(trace: RequestTrace, request: monitor_pb2.GetTraceRequest) -> bool:
    return request.engine_instance in ("", trace.instance) and (
        not request.HasField("sample_index") or request.sample_index == trace.identity.sample_index
    )
