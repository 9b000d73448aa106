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
from stream_monitor.monitor.access.book import Book, NotPermitted, NotRecognised, bearer
from stream_monitor.monitor.access.peers import NotAllowed, Peers
from stream_monitor.monitor.access.refusals import GRPC, TOO_MANY_CALLS, Refusals, no_right
from stream_monitor.monitor.access.rights import Principal, Right, run_as
from stream_monitor.monitor.access.standing import Revoked, Standing
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
        standing: told of the calls that run.
        refusals: told of each refusal.
        max_calls: of one method at a time.

    Attributes:
        peers: checks the other ends, where the address is a Unix socket; set once it listens.
    """

    def __init__(self, book: Book, standing: Standing, refusals: Refusals, max_calls: int) -> None:
        self._book = book
        self._standing = standing
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
                principal = await self._admit(context, method, right)
                try:
                    with self._running(context, method, principal, right):
                        async with contextlib.aclosing(answer(request, context)) as responses:
                            async for response in responses:
                                yield response
                except Revoked as error:
                    await _end(context, error)

            return grpc.unary_stream_rpc_method_handler(stream, *codecs)
        behaviour = handler.stream_stream or handler.unary_unary

        async def call(request: Any, context: Context) -> Any:
            principal = await self._admit(context, method, right)
            try:
                with self._running(context, method, principal, right):
                    return await behaviour(request, context)
            except Revoked as error:
                await _end(context, error)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(call, *codecs)
        return grpc.unary_unary_rpc_method_handler(call, *codecs)

    async def _admit(self, context: Context, method: str, right: Right) -> Principal:
        """Let the call go on, on behalf of whoever makes it, or end it."""
        if self.peers is not None:
            await self._check_peer(context, self.peers)
        try:
            principal = self._recognise(context, right)
        except NotRecognised as error:
            self._refusals(GRPC, error.reason, context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except NotPermitted as error:
            self._refusals(GRPC, no_right(right), error.principal.name)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        if self._calls[method] >= self._max_calls:
            self._refusals(GRPC, TOO_MANY_CALLS, principal.name)
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._max_calls} calls of this method run (setting max_calls)"
            )
        run_as(principal)
        return principal

    async def _check_peer(self, context: Context, peers: Peers) -> None:
        try:
            await peers.check()
        except NotAllowed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the Unix socket is being cleared; try again")
        # Fails if the connection is gone by now, as peers.py explains.
        await context.send_initial_metadata(())

    def _recognise(self, context: Context, right: Right) -> Principal:
        if self._book.open:
            return self._book.admit(right, None, None)
        metadata = dict(context.invocation_metadata() or ())
        held = context.auth_context().get("x509_pem_cert")
        names = certificates.names(next(iter(held))) if held else None
        header = metadata.get("authorization")
        return self._book.admit(
            right, bearer(None if header is None else str(header)), names, unix=self.peers is not None
        )

    @contextlib.contextmanager
    def _running(self, context: Context, method: str, principal: Principal, right: Right) -> Iterator[None]:
        self._calls[method] += 1
        try:
            with self._standing.holding(principal, lambda: self._recognise(context, right)):
                yield
        finally:
            self._calls[method] -= 1


async def _end(context: Context, error: Revoked) -> None:
    code = grpc.StatusCode.UNAVAILABLE if error.known else grpc.StatusCode.UNAUTHENTICATED
    await context.abort(code, str(error))
