"""`stream-monitor watch`: events as JSON lines or a live table, across restarts of the monitor."""

import asyncio
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stream_monitor.monitor.events import FINDINGS
from stream_monitor.monitor.text import one_line
from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc, summary_pb2

RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
TABLE_ROWS, EVENT_LINES, TEXT_CHARACTERS = 20, 10, 40
_PREFIX = "EVENT_KIND_"
_FINAL = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)

Kind: TypeAlias = monitor_pb2.EventKind.ValueType


class WatchError(Exception):
    """The monitor refuses the subscription for good."""


def kinds(names: Sequence[str], everything: bool) -> list[Kind]:
    """Event kinds by name, in any case; empty for all findings. Raises ValueError that lists the valid names."""
    valid = [name.removeprefix(_PREFIX).lower() for name in monitor_pb2.EventKind.keys()[1:]]
    if everything:
        names = valid
    for name in names:
        if name.lower().replace("-", "_") not in valid:
            raise ValueError(f"no such kind {name!r}; valid: {', '.join(valid)}")
    return [monitor_pb2.EventKind.Value(_PREFIX + name.upper().replace("-", "_")) for name in names]


def as_line(response: monitor_pb2.SubscribeResponse) -> str:
    """One event as one line of JSON; the ids stand at the top, enums by name, `lost` where events were lost."""
    event = response.event
    fields = MessageToDict(event, preserving_proto_field_name=True)
    line = {
        "kind": monitor_pb2.EventKind.Name(event.kind).removeprefix(_PREFIX),
        "external_id": event.external_id,
        "request_id": event.key.request_id,
        "engine_instance": event.key.engine_instance,
        "sample_index": event.key.sample_index,
        **{name: value for name, value in fields.items() if name not in ("kind", "key", "external_id", "wall_time_ns")},
        "severity": monitor_pb2.Severity.Name(event.severity).removeprefix("SEVERITY_"),
        "wall_time_ns": event.wall_time_ns,
        "cursor": response.cursor,
    }
    if response.lost:
        line["lost"] = response.lost
    return json.dumps(line)


async def follow(target: str, requests: Sequence[str], wanted: Sequence[Kind], as_json: bool) -> None:
    """Until cancelled. Raises WatchError."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = monitor_pb2_grpc.MonitorServiceStub(channel)
        if as_json:
            async for response in _events(stub, target, requests, wanted):
                print(as_line(response), flush=True)
        else:
            await _table(stub, target, requests, wanted)


async def _events(
    stub: "monitor_pb2_grpc.MonitorServiceAsyncStub", target: str, requests: Sequence[str], wanted: Sequence[Kind]
) -> AsyncIterator[monitor_pb2.SubscribeResponse]:
    """Events across restarts of the monitor; resumes by cursor where the monitor still holds it."""
    cursor, attempt = "", 0
    while True:
        request = monitor_pb2.SubscribeRequest(request_ids=requests, kinds=wanted, cursor=cursor)
        try:
            async for response in stub.Subscribe(request):
                attempt, cursor = 0, response.cursor
                if response.HasField("event"):
                    yield response
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.OUT_OF_RANGE:
                _tell(f"{error.details()}; going on from now, events in between are not shown")
                cursor = ""
                continue
            if error.code() in _FINAL:
                raise WatchError(f"{target}: {error.details()}") from None
            if attempt == 0:
                _tell(f"no answer from the monitor at {target} ({error.details()}); trying again")
        await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
        attempt += 1


def _tell(message: str) -> None:
    print(f"stream-monitor: {message}", file=sys.stderr, flush=True)


async def _table(
    stub: "monitor_pb2_grpc.MonitorServiceAsyncStub", target: str, requests: Sequence[str], wanted: Sequence[Kind]
) -> None:
    newest: deque[monitor_pb2.Event] = deque(maxlen=EVENT_LINES)

    async def collect() -> None:
        async for response in _events(stub, target, requests, wanted):
            newest.append(response.event)

    collecting = asyncio.create_task(collect())
    try:
        with Live(refresh_per_second=4) as live:
            while not collecting.done():
                live.update(Group(_requests_table(await _listed(stub, requests)), *map(_event_line, newest)))
                await asyncio.sleep(0.5)
        collecting.result()
    finally:
        collecting.cancel()


async def _listed(
    stub: "monitor_pb2_grpc.MonitorServiceAsyncStub", requests: Sequence[str]
) -> list[monitor_pb2.RequestInfo]:
    found: list[monitor_pb2.RequestInfo] = []
    try:
        for request_id in requests or [""]:
            response = await stub.ListRequests(
                monitor_pb2.ListRequestsRequest(request_id=request_id, page_size=TABLE_ROWS), timeout=2
            )
            found += response.requests
    except grpc.aio.AioRpcError:
        return []  # `_events` has said so.
    return found[:TABLE_ROWS]


def _requests_table(requests: Sequence[monitor_pb2.RequestInfo]) -> Table:
    table = Table(title="Requests, newest first")
    table.add_column("request", overflow="fold", min_width=24)
    for name in ("model", "state", "tokens", "sentences", "rows", "top anchor", "events"):
        table.add_column(name, justify="left" if name in ("model", "state", "top anchor") else "right")
    for info in requests:
        top = ""
        if info.HasField("top_anchor"):
            role = summary_pb2.Role.Name(info.top_anchor.sentence.role).removeprefix("ROLE_").lower()
            text = one_line(info.top_anchor.sentence.text, TEXT_CHARACTERS)
            top = f"#{info.top_anchor.sentence.index} {role} {info.top_anchor.share:.0%} {text}".rstrip()
        state = "running" if info.state == monitor_pb2.REQUEST_STATE_RUNNING else "finished"
        table.add_row(
            Text(info.external_id),
            Text(info.model_name),
            f"refused: {info.refused_reason}" if info.refused_reason else state,
            f"{info.prompt_tokens}+{info.output_tokens}",
            str(info.sentences),
            str(info.rows_kept),
            Text(top),
            str(info.events),
        )
    return table


def _event_line(event: monitor_pb2.Event) -> Text:
    style = "yellow" if event.kind in FINDINGS else "dim"
    return Text(
        f"{monitor_pb2.EventKind.Name(event.kind).removeprefix(_PREFIX)} {event.external_id}: {event.summary}", style
    )
