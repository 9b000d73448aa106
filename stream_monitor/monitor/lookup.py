"""Requests by id and in pages, from memory and the store as one."""

import base64
import binascii
from collections.abc import Iterable

from stream_monitor.monitor import views
from stream_monitor.monitor.access.rights import Visible
from stream_monitor.monitor.archive import Archive, StoreUnavailable
from stream_monitor.monitor.database import Listed
from stream_monitor.monitor.identity import EXACT, TraceKey, names
from stream_monitor.monitor.store import TraceStore
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.v1alpha1 import monitor_pb2

_FIRST = 2**63 - 1


class TokenMalformed(Exception):
    """Not a page token of ours."""


class Lookup:
    """What is in memory stands for what the store has of the same request. Raises StoreUnavailable."""

    def __init__(self, traces: TraceStore, archive: Archive) -> None:
        self.traces = traces
        self.archive = archive

    async def find(self, request_id: str, visible: Visible, buried: bool = False) -> list[TraceKey]:
        """Requests an id may mean, newest first; of several readings of the id, only the best that fits any.

        `visible` and `buried` as in `Archive.find`.
        """
        held = self.traces.find(request_id, visible)
        found = {(trace.instance, trace.request_id): _fit(trace, request_id) for trace in held}
        try:
            stored = await self.archive.find(request_id, visible, buried)
        except StoreUnavailable:
            if not buried or not held:
                raise
            # These go from memory now; the deletion says that the store has to be asked again.
            stored = []
        for key, fit in stored:
            if self.traces.get(*key) is None:
                found.setdefault(key, fit)
        best = min(found.values(), default=EXACT)
        return [key for key, fit in found.items() if fit == best]

    async def trace(self, key: TraceKey, with_heads: bool) -> monitor_pb2.GetTraceResponse | None:
        """A whole trace."""
        held = self.traces.get(*key)
        return views.full(held, with_heads) if held is not None else await self.archive.trace(key, with_heads)

    async def page(
        self, request: monitor_pb2.ListRequestsRequest, size: int, visible: Visible
    ) -> monitor_pb2.ListRequestsResponse:
        """One page of requests, newest first, of visible tenants. Raises TokenMalformed."""
        before = _serial(request.page_token) if request.page_token else _FIRST
        traces: Iterable[RequestTrace] = self.traces.newest_first()
        fit = EXACT
        if request.request_id:
            fit = min((fit for _, fit in await self.archive.find(request.request_id, visible)), default=_FIRST)
            held = self.traces.find(request.request_id, visible)
            fit = min([fit, *(_fit(trace, request.request_id) for trace in held)])
            traces = (trace for trace in held if _fit(trace, request.request_id) == fit)
        memory: list[Listed] = []
        for trace in traces:
            if trace.serial < before and _wanted(trace, request) and visible(trace.tenant):
                memory.append((trace.serial, views.info(trace)))
                if len(memory) > size:
                    break
        floor = memory[-1][0] if len(memory) > size else 0
        stored = await self._stored(request, fit, before, floor, size + 1, visible)
        listed = sorted(memory + stored, key=lambda entry: -entry[0])
        response = monitor_pb2.ListRequestsResponse(requests=[info for _, info in listed[:size]])
        if len(listed) > size:
            response.next_page_token = base64.urlsafe_b64encode(str(listed[size - 1][0]).encode()).decode()
        return response

    async def _stored(
        self,
        request: monitor_pb2.ListRequestsRequest,
        fit: int,
        before: int,
        floor: int,
        limit: int,
        visible: Visible,
    ) -> list[Listed]:
        """The newest requests, at most `limit`, in the store alone, of those between two serials."""
        found: list[Listed] = []
        while len(found) < limit:
            page = await self.archive.infos(before, limit, request.model_name, request.engine, request.request_id, fit)
            for serial, info in page:
                if self._is_stored_alone(info.key) and serial > floor and len(found) < limit and visible(info.tenant):
                    found.append((serial, info))
            if len(page) < limit or page[-1][0] <= floor:
                break
            before = page[-1][0]
        return found

    def _is_stored_alone(self, key: monitor_pb2.TraceKey) -> bool:
        return self.traces.get(key.engine_instance, key.request_id) is None and not self.archive.is_buried(key)


def _fit(trace: RequestTrace, request_id: str) -> int:
    return names(trace.request_id)[request_id]


def _wanted(trace: RequestTrace, request: monitor_pb2.ListRequestsRequest) -> bool:
    model_name, engine = trace.labels
    return request.model_name in ("", model_name) and request.engine in ("", engine)


def _serial(token: str) -> int:
    try:
        return int(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError):
        raise TokenMalformed("page_token is not one that this service gave out") from None
