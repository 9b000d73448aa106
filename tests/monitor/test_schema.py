"""A monitor takes in what older plug-ins send. The contract's own guard is `buf breaking` in `make protos-check`."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from google.protobuf.internal.decoder import _DecodeVarint32

from stream_monitor.v1alpha1 import ingest_pb2, monitor_pb2, summary_pb2
from tests.monitor.conftest import Running

FIRST = Path(__file__).parent / "data" / "first_schema.binpb.gz"
"""PublishRequests of one request, each behind its length as a varint, serialized by the code that the first version of
the contract generated (the repository's first commit): without the fields that came later."""


def recorded(file: Path) -> list[bytes]:
    """The messages of a recording."""
    content, messages, place = gzip.decompress(file.read_bytes()), [], 0
    while place < len(content):
        size, place = _DecodeVarint32(content, place)
        messages.append(content[place : place + size])
        place += size
    return messages


def test_what_the_first_plug_in_sent_becomes_traces_findings_and_an_account(run: Callable[..., Running]) -> None:
    monitor, messages = run(), recorded(FIRST)
    last = ingest_pb2.PublishRequest.FromString(messages[-1]).summary
    assert last.schema_version == 1
    assert not last.ledger.queues, "a field that came later"
    answers = monitor.publish_raw(messages)
    assert {answer.outcome for answer in answers} == {ingest_pb2.PUBLISH_OUTCOME_ACCEPTED}
    trace = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="first"))
    assert trace.info.state == monitor_pb2.REQUEST_STATE_FINISHED
    assert trace.info.rows_kept == sum(
        ingest_pb2.PublishRequest.FromString(message).summary.rows.count for message in messages
    )
    assert np.frombuffer(trace.matrix_share, "<f4").any()
    assert [monitor_pb2.EventKind.Name(event.kind) for event in trace.events] == ["EVENT_KIND_ANCHOR_SHIFT"]
    counts = {cell.outcome: cell.count for cell in last.ledger.token_rows}
    expected = monitor.metric("stream_monitor_rows_expected_total", phase="token")
    assert expected == counts["expected"] == monitor.metric("stream_monitor_rows_total", phase="token")


def test_fields_of_a_newer_plug_in_are_passed_over(run: Callable[..., Running]) -> None:
    monitor = run()
    messages = recorded(FIRST)
    summary = ingest_pb2.PublishRequest.FromString(messages[0]).summary.SerializeToString()
    newer = summary + bytes([0xFA, 0x7F, 3]) + b"new"  # field 2047, a string
    assert summary_pb2.StepSummary.FromString(newer).sequence == 1
    request = bytes([0x0A, *_varint(len(newer))]) + newer
    assert [answer.outcome for answer in monitor.publish_raw([request])] == [ingest_pb2.PUBLISH_OUTCOME_ACCEPTED]


def _varint(number: int) -> bytes:
    found = b""
    while number > 0x7F:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])
