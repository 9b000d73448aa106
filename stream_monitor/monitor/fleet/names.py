"""What the messages of a stream are called. docs/fleet.md tells it to other subscribers."""

import hashlib
from urllib.parse import quote

from stream_monitor.monitor.database_file import PUBLIC
from stream_monitor.v1alpha1 import monitor_pb2

FINDING, TRACE, DELETED = "finding", "trace", "deleted"
"""Second token of a subject; also the label `record` of metrics."""

MESSAGE_ID, REQUEST, KIND = "Nats-Msg-Id", "Stream-Monitor-Request", "Stream-Monitor-Kind"
CONTENT_TYPE, CONTENT_ENCODING, WITHOUT = "Content-Type", "Content-Encoding", "Stream-Monitor-Without"
"""Headers."""


def token(text: str) -> str:
    """A label as one token of a subject: percent-encoded, dots too, which separate tokens.

    >>> token("Qwen/Qwen2.5-0.5B"), token("")
    ('Qwen%2FQwen2%2E5-0%2E5B', '%')
    """
    return quote(text, safe="").replace(".", "%2E").replace("~", "%7E") or "%"


def request_hash(key: monitor_pb2.TraceKey) -> str:
    """Names a request without telling its id: 32 hexadecimal digits."""
    return PUBLIC.trace(key.engine_instance, key.request_id).hex()


def subject(stream: str, record: str, model_name: str, engine: str, request: str) -> str:
    """Of a finding or a trace; `request` as in `request_hash`."""
    return f"{stream}.{record}.{token(model_name)}.{token(engine)}.{request}"


def subjects_of(stream: str, request: str) -> str:
    """All subjects that messages of a request have."""
    return f"{stream}.*.*.*.{request}"


def tombstone(stream: str, request: str) -> str:
    """Subject of the message that says a request is deleted; `*` for all."""
    return f"{stream}.{DELETED}.{request}"


def event_id(event: monitor_pb2.Event) -> str:
    """Names a finding: a detector raises at most one at a sentence. 32 hexadecimal digits."""
    key = event.key
    parts = (key.engine_instance, key.request_id, event.kind, event.sentence.index, event.wall_time_ns)
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def trace_id(trace: bytes) -> str:
    """Names one state of a trace."""
    return hashlib.blake2b(trace, digest_size=16).hexdigest()


def header(text: str) -> str:
    """An id as a header's value: as it is, but for what headers cannot hold."""
    return quote(text, safe="".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%"))
