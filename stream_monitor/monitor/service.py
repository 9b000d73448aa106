"""MonitorService: events to subscribers, traces and lists to whoever asks, and deletion."""

from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from stream_monitor.monitor import views
from stream_monitor.monitor.access import redaction, rights
from stream_monitor.monitor.access.rights import Right, Visible
from stream_monitor.monitor.archive import StoreUnavailable
from stream_monitor.monitor.deletion import Deletes, DeletionUnfinished
from stream_monitor.monitor.events import (
    FINDINGS,
    CursorGone,
    CursorMalformed,
    EventLog,
    TooManySubscribers,
    Wanted,
)
from stream_monitor.monitor.identity import TraceKey, parse
from stream_monitor.monitor.lookup import Lookup, TokenMalformed
from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc

SERVICE = monitor_pb2.DESCRIPTOR.services_by_name["MonitorService"].full_name
DEFAULT_PAGE, MAX_PAGE = 100, 1000
MAX_LAST = 1000
"""Findings that a subscription may ask for from before it began."""
MAX_FILTER = 1000
"""Entries of each filter list of a subscription."""
OLDEST_CURSOR = "oldest-cursor"
"""Trailing metadata of OUT_OF_RANGE."""

Context = grpc.aio.ServicerContext[Any, Any]


class MonitorService(monitor_pb2_grpc.MonitorServiceServicer):
    """Answers from memory and the store."""

    def __init__(self, lookup: Lookup, log: EventLog, deletion: Deletes) -> None:
        self.lookup = lookup
        self.log = log
        self.deletion = deletion

    async def Subscribe(
        self, request: monitor_pb2.SubscribeRequest, context: Context
    ) -> AsyncIterator[monitor_pb2.SubscribeResponse]:
        """Stream events; see `monitor.proto`."""
        for name in ("model_names", "engines", "request_ids", "kinds"):
            if len(getattr(request, name)) > MAX_FILTER:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{name} has more than {MAX_FILTER} entries")
        if request.last > MAX_LAST:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"last is {request.last}; at most {MAX_LAST}")
        principal = rights.current()
        owner = "" if principal is rights.ANYBODY else principal.name
        try:
            subscriber, cursor = self.log.subscribe(
                wanted(request, principal.sees(Right.SUBSCRIBE)),
                request.cursor,
                request.last,
                owner,
                progress=not FINDINGS.issuperset(request.kinds),
            )
        except CursorGone as error:
            await _gone(context, error)
        except CursorMalformed as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TooManySubscribers as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        try:
            yield monitor_pb2.SubscribeResponse(cursor=cursor)
            while (waiting := await subscriber.next()) is not None:
                sequence, event, lost = waiting
                event = redaction.of_event(event, principal)
                yield monitor_pb2.SubscribeResponse(event=event, cursor=self.log.cursor(sequence), lost=lost)
        except CursorGone as error:
            await _gone(context, error)
        except StoreUnavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        finally:
            self.log.subscribers.discard(subscriber)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the monitor is stopping")

    async def GetTrace(self, request: monitor_pb2.GetTraceRequest, context: Context) -> monitor_pb2.GetTraceResponse:
        """One request's trace; see `monitor.proto`."""
        try:
            (key,) = await self._narrowed(request, context, Right.SUBSCRIBE)
            trace = await self.lookup.trace(key, request.with_heads)
            if trace is not None:
                redaction.of_trace(trace, rights.current())
                return trace
        except StoreUnavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return await _not_found(request, context)

    async def ListRequests(
        self, request: monitor_pb2.ListRequestsRequest, context: Context
    ) -> monitor_pb2.ListRequestsResponse:
        """Requests held, newest first; see `monitor.proto`."""
        if request.page_size > MAX_PAGE:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"page_size is {request.page_size}; at most {MAX_PAGE}"
            )
        principal = rights.current()
        try:
            page = await self.lookup.page(request, request.page_size or DEFAULT_PAGE, principal.sees(Right.SUBSCRIBE))
            for info in page.requests:
                redaction.of_info(info, principal)
            return page
        except TokenMalformed as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except StoreUnavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        raise AssertionError("abort raises")

    async def DeleteRequest(
        self, request: monitor_pb2.DeleteRequestRequest, context: Context
    ) -> monitor_pb2.DeleteRequestResponse:
        """Remove a request for good; see `monitor.proto`."""
        try:
            keys = await self._narrowed(request, context, Right.DELETE)
            await self.deletion.delete(keys, f"{rights.current().name} at {context.peer()}")
        except (DeletionUnfinished, StoreUnavailable) as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return monitor_pb2.DeleteRequestResponse(keys=[_trace_key(key) for key in keys])

    async def _narrowed(
        self,
        request: monitor_pb2.GetTraceRequest | monitor_pb2.DeleteRequestRequest,
        context: Context,
        right: Right,
    ) -> list[TraceKey]:
        """The one request that is meant, or all where that was asked for, of the tenants for which the right holds."""
        deleting = isinstance(request, monitor_pb2.DeleteRequestRequest)
        found = [
            key
            for key in await self.lookup.find(request.request_id, rights.current().sees(right), buried=deleting)
            if request.engine_instance in ("", key[0])
            and (not request.HasField("sample_index") or request.sample_index == parse(key[1]).sample_index)
        ]
        if not found:
            await _not_found(request, context)
        if len(found) > 1 and not (isinstance(request, monitor_pb2.DeleteRequestRequest) and request.all):
            keys = "; ".join(
                f"engine_instance={instance} request_id={request_id} sample_index={parse(request_id).sample_index}"
                for instance, request_id in found[:20]
            )
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"{len(found)} traces carry {request.request_id!r}: {keys}"
            )
        return found


async def _not_found(
    request: monitor_pb2.GetTraceRequest | monitor_pb2.DeleteRequestRequest, context: Context
) -> NoReturn:
    await context.abort(
        grpc.StatusCode.NOT_FOUND, f"no trace of request {request.request_id!r}: unknown, no longer held, or deleted"
    )
    raise AssertionError("abort raises")


async def _gone(context: Context, error: CursorGone) -> None:
    await context.abort(grpc.StatusCode.OUT_OF_RANGE, str(error), ((OLDEST_CURSOR, error.oldest),))


def _trace_key(key: TraceKey) -> monitor_pb2.TraceKey:
    instance, request_id = key
    return monitor_pb2.TraceKey(
        engine_instance=instance, request_id=request_id, sample_index=parse(request_id).sample_index
    )


def wanted(request: monitor_pb2.SubscribeRequest, visible: Visible) -> Wanted:
    """The subscription's filters, and which tenants' events exist for the subscriber, as one test."""
    models, engines = frozenset(request.model_names), frozenset(request.engines)
    ids = frozenset(request.request_ids)
    kinds = frozenset(request.kinds) or FINDINGS
    minimum = request.minimum_severity

    def test(event: monitor_pb2.Event) -> bool:
        return (
            event.kind in kinds
            and visible(event.tenant)
            and event.severity >= minimum
            and (not models or event.model_name in models)
            and (not engines or event.engine in engines)
            and (not ids or not ids.isdisjoint(views.event_ids(event)))
        )

    return test
