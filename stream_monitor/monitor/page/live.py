"""Subscribe as server-sent events: one open response per page, bounded in number and, by the subscriber, in memory."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, cast

import grpc
from google.protobuf.json_format import MessageToJson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from stream_monitor.monitor.page.api import Call, Refused, parsed
from stream_monitor.monitor.page.guard import TOO_MANY_PAGES
from stream_monitor.monitor.service import MonitorService
from stream_monitor.v1alpha1 import monitor_pb2

RETRY_MILLISECONDS = 2000
"""After which a browser connects again."""
PING_SECONDS = 15.0
"""A comment this often keeps proxies from closing the response, and shows us browsers that went away."""

Responses = AsyncGenerator[monitor_pb2.SubscribeResponse, None]


class Live:
    """The streams of all pages; at most `limit` at a time."""

    def __init__(self, service: MonitorService, limit: int, refused: Callable[[str], None]) -> None:
        self._service = service
        self._refused = refused
        self._limit = limit
        self.open = 0

    async def events(self, request: Request) -> Response:
        """The events a page asks for, from the cursor of the last one it had.

        Each is named `event` and carries a SubscribeResponse; the first, without an event, says that the subscription
        stands. `gone` stands before it if events may be missing in between.
        """
        try:
            asked = parsed(monitor_pb2.SubscribeRequest(), request.query_params, set())
            asked.cursor = request.headers.get("last-event-id") or asked.cursor
            if self.open >= self._limit:
                self._refused(TOO_MANY_PAGES)
                raise Refused(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._limit} pages are live (setting max_live_pages)"
                )
            responses, first = await self._subscribe(asked)
        except Refused as refused:
            return refused.response()
        return _Open(self, responses, first)

    async def _subscribe(self, asked: monitor_pb2.SubscribeRequest) -> tuple[Responses, str]:
        """A subscription that stands, and the lines that say so. Raises Refused."""
        opening = f"retry: {RETRY_MILLISECONDS}\n\n"
        try:
            responses = self._responses(asked)
            return responses, opening + _event(await anext(responses))
        except Refused as refused:
            if refused.code is not grpc.StatusCode.OUT_OF_RANGE:
                raise
            # Of another start of the monitor, or too old: go on from what there is, and say so.
            asked.cursor = ""
            responses = self._responses(asked)
            return responses, f"{opening}event: gone\ndata: {{}}\n\n{_event(await anext(responses))}"

    def _responses(self, asked: monitor_pb2.SubscribeRequest) -> Responses:
        return cast(Responses, self._service.Subscribe(asked, cast(Any, Call())))


class _Open(StreamingResponse):
    """One page's response; closes its subscription however it ends, also before the first byte."""

    def __init__(self, live: Live, responses: Responses, first: str) -> None:
        # Proxies shall not collect events before they pass them on.
        super().__init__(self._lines(first), media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._live = live
        self._responses = responses
        self._waiting: asyncio.Task[monitor_pb2.SubscribeResponse] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until either side has enough."""
        self._live.open += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._live.open -= 1
            if self._waiting is not None:
                self._waiting.cancel()
                await asyncio.gather(self._waiting, return_exceptions=True)
            await self._responses.aclose()

    async def _lines(self, first: str) -> AsyncIterator[str]:
        yield first
        while True:
            self._waiting = self._waiting or asyncio.ensure_future(anext(self._responses))
            done, _ = await asyncio.wait({self._waiting}, timeout=PING_SECONDS)
            if not done:
                yield ": ping\n\n"
                continue
            answered, self._waiting = self._waiting, None
            try:
                yield _event(answered.result())
            except Refused:
                return  # The monitor stops; the browser comes back by itself.


def _event(response: monitor_pb2.SubscribeResponse) -> str:
    return f"id: {response.cursor}\nevent: event\ndata: {MessageToJson(response, indent=None)}\n\n"
