"""Findings, traces and deletions as messages of the stream, and back."""

import zlib
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from stream_monitor.monitor import head_views
from stream_monitor.monitor.fleet import names
from stream_monitor.v1alpha1 import monitor_pb2

MAX_TRACE_BYTES = 256 << 20
"""Of a trace that is unpacked: what says to be more is not one of ours."""
_LEVEL = 1
"""Of zlib itself, not of what packs for the store: the broker bounds a message, and this makes it a bit smaller."""

M = TypeVar("M", bound=Message)


class TooLarge(Exception):
    """No form of it fits into a message of the broker."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"{size} bytes, and the broker takes {limit}")


class Malformed(Exception):
    """Not a message of ours."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish."""

    subject: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes that count against the broker's limit: body and headers."""
        lines = (len(name) + len(value.encode()) + 4 for name, value in self.headers.items())
        return len(self.body) + len("NATS/1.0\r\n\r\n") + sum(lines)


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message as it was read: exactly one of the three is there.

    Attributes:
        deleted: `names.request_hash` of a request that was deleted.
    """

    event: monitor_pb2.Event | None = None
    trace: monitor_pb2.GetTraceResponse | None = None
    deleted: str = ""


def finding(stream: str, event: monitor_pb2.Event, limit: int) -> Outgoing:
    """A finding as a message of at most `limit` bytes. Raises TooLarge."""
    headers = _headers(names.event_id(event), event.external_id, event)
    headers[names.KIND] = monitor_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_")
    where = names.subject(stream, names.FINDING, event.model_name, event.engine, names.request_hash(event.key))
    return _fitting(Outgoing(where, event.SerializeToString(deterministic=True), headers), limit)


def trace(stream: str, found: monitor_pb2.GetTraceResponse, limit: int) -> Outgoing:
    """A trace as a message of at most `limit` bytes: packed, and if that is too much, without the matrices of single
    heads, which a header then says. Raises TooLarge."""
    info = found.info
    where = names.subject(stream, names.TRACE, info.model_name, info.engine, names.request_hash(info.key))
    try:
        return _packed(where, found, limit, {})
    except TooLarge:
        head_views.clear_heads(found)
        return _packed(where, found, limit, {names.WITHOUT: "heads"})


def deletion(stream: str, request: str) -> Outgoing:
    """That a request, by its hash, is deleted."""
    return Outgoing(names.tombstone(stream, request), b"", {names.MESSAGE_ID: f"deleted-{request}"})


def read(stream: str, subject: str, headers: dict[str, str] | None, body: bytes) -> Incoming:
    """A message of the stream. Raises Malformed, one line."""
    parts = subject.removeprefix(f"{stream}.").split(".")
    if parts[0] == names.DELETED and len(parts) == 2 and _is_hash(parts[1]):
        return Incoming(deleted=parts[1])
    if (headers or {}).get(names.CONTENT_ENCODING) == "deflate":
        body = _unpacked(body)
    if parts[0] == names.FINDING:
        event = _parsed(monitor_pb2.Event(), body)
        _check(subject, names.subject(stream, names.FINDING, event.model_name, event.engine, _hash(event.key)))
        return Incoming(event=event)
    if parts[0] == names.TRACE:
        found = _parsed(monitor_pb2.GetTraceResponse(), body)
        info = found.info
        _check(subject, names.subject(stream, names.TRACE, info.model_name, info.engine, _hash(info.key)))
        return Incoming(trace=found)
    raise Malformed("its subject is none of ours")


def _headers(message_id: str, external_id: str, message: Message) -> dict[str, str]:
    return {
        names.MESSAGE_ID: message_id,
        names.REQUEST: names.header(external_id),
        names.CONTENT_TYPE: f"application/x-protobuf; messageType={message.DESCRIPTOR.full_name}",
    }


def _packed(where: str, found: monitor_pb2.GetTraceResponse, limit: int, more: dict[str, str]) -> Outgoing:
    raw = found.SerializeToString(deterministic=True)
    headers = _headers(names.trace_id(raw), found.info.external_id, found) | {names.CONTENT_ENCODING: "deflate"} | more
    return _fitting(Outgoing(where, zlib.compress(raw, _LEVEL), headers), limit)


def _fitting(message: Outgoing, limit: int) -> Outgoing:
    if message.size > limit:
        raise TooLarge(message.size, limit)
    return message


def _unpacked(body: bytes) -> bytes:
    unpacking = zlib.decompressobj()
    try:
        raw = unpacking.decompress(body, MAX_TRACE_BYTES)
    except zlib.error as error:
        raise Malformed(f"it cannot be unpacked: {error}") from None
    if not unpacking.eof:
        raise Malformed("it ends early, or is too large")
    return raw


def _parsed(message: M, body: bytes) -> M:
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise Malformed("it is no such message") from None
    return message


def _hash(key: monitor_pb2.TraceKey) -> str:
    if not key.request_id or not key.engine_instance:
        raise Malformed("it names no request")
    return names.request_hash(key)


def _check(subject: str, expected: str) -> None:
    """A request that is deleted is found by its subjects: they must be right."""
    if subject != expected:
        raise Malformed("its subject is not that of its content")


def _is_hash(text: str) -> bool:
    return len(text) == 32 and all(digit in "0123456789abcdef" for digit in text)
