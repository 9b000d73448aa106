"""`MonitorService` for a server: requests stay bytes until here, so that what cannot be parsed is refused by name and
counted."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from stream_monitor.monitor.access.refusals import GRPC, UNREADABLE, Refusals
from stream_monitor.v1alpha1 import monitor_pb2
from stream_monitor.v1alpha1.monitor_pb2_grpc import MonitorServiceServicer

_SERVICE = monitor_pb2.DESCRIPTOR.services_by_name["MonitorService"]
Context = grpc.aio.ServicerContext[Any, Any]


def monitor_handler(servicer: MonitorServiceServicer, refusals: Refusals) -> grpc.GenericRpcHandler:
    """All methods of the service; `refusals` is told of what cannot be parsed."""
    handlers: dict[str, grpc.RpcMethodHandler[bytes, Any]] = {}
    for method in _SERVICE.methods:
        kind: type[Message] = GetMessageClass(method.input_type)
        answer = getattr(servicer, method.name)
        if method.server_streaming:
            handlers[method.name] = grpc.unary_stream_rpc_method_handler(
                _streaming(kind, answer, refusals), response_serializer=_serialized
            )
        else:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                _once(kind, answer, refusals), response_serializer=_serialized
            )
    return grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers)


def _once(kind: type[Message], answer: Callable[[Any, Context], Awaitable[Message]], refusals: Refusals) -> Any:
    async def call(raw: bytes, context: Context) -> Message:
        return await answer(await _parsed(kind, raw, context, refusals), context)

    return call


def _streaming(
    kind: type[Message], answer: Callable[[Any, Context], AsyncIterator[Message]], refusals: Refusals
) -> Any:
    async def call(raw: bytes, context: Context) -> AsyncIterator[Message]:
        async for response in answer(await _parsed(kind, raw, context, refusals), context):
            yield response

    return call


async def _parsed(kind: type[Message], raw: bytes, context: Context, refusals: Refusals) -> Message:
    try:
        return kind.FromString(raw)
    except DecodeError:
        refusals(GRPC, UNREADABLE, context.peer())
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a {kind.DESCRIPTOR.name}")
    raise AssertionError("abort raises")


def _serialized(response: Message) -> bytes:
    return response.SerializeToString()
