"""One attack each: everything that a stranger may send to the monitor's ports, drawn from a seed."""

import base64
import socket
import uuid
from collections.abc import Callable
from random import Random

import grpc
import numpy as np
from google.protobuf.message import Message

from stream_monitor.v1alpha1 import ingest_pb2, monitor_pb2, summary_pb2
from tests.fuzz.mutations import corrupted, mutated
from tests.fuzz.target import SECONDS, Target
from tests.monitor import synthetic

CONTRACT = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
}
"""How a stream of summaries may end, by `ingest.proto`."""
ANSWERS = CONTRACT | {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}
"""How a call of the other service may end."""


def publish(target: Target, draw: Random) -> None:
    """A stream of sound summaries, one of which was changed."""
    sender = synthetic.Engine(synthetic.engine(str(uuid.UUID(int=draw.getrandbits(128)))))
    name = draw.choice(("r", "chatcmpl-x-00000000", f"{draw.getrandbits(20)}"))
    summaries = [_whole(summary, sender, name, draw) for summary in sender.request(name, [1, 3, 5])]
    place = draw.randrange(len(summaries))
    messages = [ingest_pb2.PublishRequest(summary=summary).SerializeToString() for summary in summaries]
    messages[place] = mutated(ingest_pb2.PublishRequest(summary=summaries[place]), draw)
    answers, code, details = target.publish(messages)
    if code is grpc.StatusCode.OK:
        assert answers == len(messages)
        return
    assert code in CONTRACT, f"{code}: {details}"
    assert details
    assert "\n" not in details
    assert answers >= place, "what came before it counts"
    target.faults += 1


def _whole(
    summary: summary_pb2.StepSummary, sender: synthetic.Engine, name: str, draw: Random
) -> summary_pb2.StepSummary:
    """A summary that has something in each of its fields."""
    summary.audits.add(row=0, layer=0, query_head=0, recall=draw.random())
    summary.ledger.queues.add(name="ring", size=1, capacity=2)
    summary.wall_time_ns = 1_700_000_000_000_000_000
    if summary.started:
        summary.started[0].prompt_token_ids = np.arange(48, dtype="<u4").tobytes()
    if summary.HasField("rows"):
        lead = summary.rows.count * sender.heads
        summary.rows.learned_sink_log_share = np.full(lead, -np.inf, "<f2").tobytes()
    return summary


def call(target: Target, draw: Random) -> None:
    """A request to `MonitorService`, changed."""
    cursor = base64.urlsafe_b64encode(
        draw.choice(("", "a:b", f"{uuid.uuid4().hex}:{draw.getrandbits(70)}", ":-1", "é:1")).encode()
    ).decode()
    sound: dict[str, Message] = {
        "Subscribe": monitor_pb2.SubscribeRequest(
            model_names=["tiny"], kinds=[1, 5], cursor=draw.choice(("", cursor)), last=draw.choice((0, 5, 10**6))
        ),
        "GetTrace": monitor_pb2.GetTraceRequest(request_id="r", sample_index=0, with_heads=True),
        "ListRequests": monitor_pb2.ListRequestsRequest(page_size=3, page_token=draw.choice(("", cursor, "1"))),
        "DeleteRequest": monitor_pb2.DeleteRequestRequest(request_id="r", sample_index=0),
    }
    name = draw.choice(list(sound))
    raw = mutated(sound[name], draw)
    path = f"/stream_monitor.v1alpha1.MonitorService/{name}"
    code, details = _asked(target, path, raw, streaming=name == "Subscribe")
    assert code in ANSWERS, f"{name}: {code}: {details}"
    assert details or code is grpc.StatusCode.OK


def _asked(target: Target, path: str, raw: bytes, streaming: bool) -> tuple[grpc.StatusCode, str]:
    """How a call of raw bytes ended; of a stream, how it began."""
    channel = target.process.channel
    try:
        if streaming:
            stream = channel.unary_stream(path, None, None)(raw, timeout=SECONDS)
            next(iter(stream))
            stream.cancel()
        else:
            channel.unary_unary(path, None, None)(raw, timeout=SECONDS)
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


_PATHS = (
    "/", "/metrics", "/healthz", "/readyz", "/events", "/trace", "/api/requests", "/api/trace", "/api/status",
    "/api/events", "/static/js/main.js", "/static/../../monitor.db", "/static/%2e%2e/%2e%2e/server.py", "//", "/%00",
    "/" + "a" * 9000, "*", "http://other/metrics", "", "/api/trace?request_id=%ff%fe", "/é",
)  # fmt: skip
_QUERIES = (
    "", "request_id=r", "request_id=" + "x" * 5000, "page_size=-1", "page_size=99999999999", "page_token=%00",
    "kinds=nope", "kinds=EVENT_KIND_ANCHOR_SHIFT&kinds=99", "last=1e9", "cursor=AAAA", "sample_index=-5", "&&&=&",
    "a[]=1", "with_heads=maybe", "download=1&request_id=%0d%0aX-A:%20b", "%", "minimum_severity=SEVERITY_CRITICAL",
)  # fmt: skip
_HEADERS = (
    b"Host: localhost", b"Host: evil.example", b"Host:", b"Content-Length: -1", b"Content-Length: 99999999999",
    b"Transfer-Encoding: chunked", b"Connection: Upgrade\r\nUpgrade: websocket", b"Accept: " + b"a/b," * 500,
    b"Range: bytes=0-,5-1", b"X: \xff\xfe", b"Sec-Fetch-Site: cross-site", b"Last-Event-ID: AAAA",
    b"Expect: 100-continue", b": nameless", b"If-None-Match: \"x", b"Cookie: " + b"c" * 20000,
)  # fmt: skip


def http(target: Target, draw: Random) -> None:
    """Something that looks more or less like a request over HTTP."""
    method = draw.choice(
        (b"GET", b"GET", b"GET", b"HEAD", b"POST", b"PUT", b"OPTIONS", b"get", b"\x16\x03\x01", b"PRI")
    )
    query = draw.choice(_QUERIES)
    address = draw.choice(_PATHS) + (f"?{query}" if query else "")
    headers = [b"Host: localhost", *draw.sample(_HEADERS, draw.randrange(3))]
    raw = b"%s %s %s\r\n" % (method, address.encode(), draw.choice((b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"")))
    raw += b"".join(header + b"\r\n" for header in headers) + b"\r\n" + draw.choice((b"", b"5\r\nabc", b"x" * 70_000))
    if draw.random() < 0.3:
        raw = corrupted(raw, draw)
    host, _, port = target.process.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        try:
            size = draw.choice((1 << 20, 1000))
            for part in range(0, len(raw), size):
                connection.sendall(raw[part : part + size])
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
        except TimeoutError:
            raise  # It hangs.
        except OSError:
            return  # It was closed in the middle.
    if answer.startswith(b"HTTP/"):
        status = int(answer.split(b" ", 2)[1])
        assert status < 500 or status == 503, answer


ATTACKS: dict[str, Callable[[Target, Random], None]] = {"publish": publish, "call": call, "http": http}
