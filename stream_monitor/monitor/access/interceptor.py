"""What stands before every gRPC call: who asks, may they, and is there room for one more.

    UNAUTHENTICATED       no credential where one is needed, or one that is not known
    PERMISSION_DENIED     known, and without the right that the method needs, for any tenant
    RESOURCE_EXHAUSTED    a limit on calls is reached

It runs once a call: messages of a stream cost nothing.
"""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeAlias

import grpc

from stream_monitor.monitor.access import certificates
from stream_monitor.monitor.access.book import Book, NotRecognised, bearer
from stream_monitor.monitor.access.peers import NotAllowed, Peers
from stream_monitor.monitor.access.refusals import GRPC, PEER, TOO_MANY_CALLS, Refusals, no_right
from stream_monitor.monitor.access.rights import Principal, Right, run_as
from stream_monitor.v1alpha1 import ingest_pb2, monitor_pb2

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continue: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"

_INGEST = ingest_pb2.DESCRIPTOR.services_by_name["IngestService"].full_name
_MONITOR = monitor_pb2.DESCRIPTOR.services_by_name["MonitorService"].full_name
RIGHTS: Mapping[str, Right] = {
    f"/{_INGEST}/Publish": Right.PUBLISH,
    f"/{_MONITOR}/Subscribe": Right.SUBSCRIBE,
    f"/{_MONITOR}/GetTrace": Right.SUBSCRIBE,
    f"/{_MONITOR}/ListRequests": Right.SUBSCRIBE,
    f"/{_MONITOR}/DeleteRequest": Right.DELETE,
}
"""What each method needs. Others, health and reflection, tell nothing of requests and are open: orchestrators ask."""


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """For one listening address.

    Args:
        book: who is who.
        refusals: told of each refusal.
        max_calls: of one method at a time.

    Attributes:
        peers: checks the other ends, where the address is a Unix socket; set once it listens.
    """

    def __init__(self, book: Book, refusals: Refusals, max_calls: int) -> None:
        self._book = book
        self._refusals = refusals
        self._max_calls = max_calls
        self._calls: Counter[str] = Counter()
        self.peers: Peers | None = None

    async def intercept_service(
        self, continuation: Continue, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """The method's handler, guarded; None if there is no such method."""
        handler = await continuation(handler_call_details)
        right = RIGHTS.get(handler_call_details.method)
        if handler is None or right is None:
            return handler
        return self._guarded(handler, handler_call_details.method, right)

    def _guarded(self, handler: Any, method: str, right: Right) -> Handler:
        codecs = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming and not handler.request_streaming:
            answer = handler.unary_stream

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                await self._admit(context, method, right)
                with self._counted(method):
                    async with contextlib.aclosing(answer(request, context)) as responses:
                        async for response in responses:
                            yield response

            return grpc.unary_stream_rpc_method_handler(stream, *codecs)
        behaviour = handler.stream_stream or handler.unary_unary

        async def call(request: Any, context: Context) -> Any:
            await self._admit(context, method, right)
            with self._counted(method):
                return await behaviour(request, context)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(call, *codecs)
        return grpc.unary_unary_rpc_method_handler(call, *codecs)

    async def _admit(self, context: Context, method: str, right: Right) -> None:
        """Let the call go on, on behalf of whoever makes it, or end it."""
        if self.peers is not None:
            await self._check_peer(context, self.peers)
        try:
            principal = self._recognise(context)
        except NotRecognised as error:
            self._refusals(GRPC, error.reason, context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        if not principal.has(right):
            self._refusals(GRPC, no_right(right), principal.name)
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, f"{principal.name} does not have the right {right.value}"
            )
        if self._calls[method] >= self._max_calls:
            self._refusals(GRPC, TOO_MANY_CALLS, principal.name)
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._max_calls} calls of this method run (setting max_calls)"
            )
        run_as(principal)

    async def _check_peer(self, context: Context, peers: Peers) -> None:
        before = peers.refused
        try:
            await peers.check()
        except NotAllowed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the Unix socket is being cleared; try again")
        finally:
            for _ in range(peers.refused - before):
                self._refusals(GRPC, PEER, peers.path)
        # Fails if the connection is gone by now, as peers.py explains.
        await context.send_initial_metadata(())

    def _recognise(self, context: Context) -> Principal:
        if self._book.open:
            return self._book.recognise(None, None)
        metadata = dict(context.invocation_metadata() or ())
        held = context.auth_context().get("x509_pem_cert")
        names = certificates.names(next(iter(held))) if held else None
        header = metadata.get("authorization")
        return self._book.recognise(bearer(None if header is None else str(header)), names, unix=self.peers is not None)

    @contextlib.contextmanager
    def _counted(self, method: str) -> Iterator[None]:
        self._calls[method] += 1
        try:
            yield
        finally:
            self._calls[method] -= 1
