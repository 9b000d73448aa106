"""`stream-monitor watch`: events as a live table, or line by line, across restarts of the monitor."""

import asyncio
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

from google.protobuf.json_format import MessageToDict
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stream_monitor.client import AsyncMonitor, MonitorError, Received, Target
from stream_monitor.client.subscription import KINDS, kind_numbers
from stream_monitor.monitor.events import FINDINGS
from stream_monitor.monitor.text import one_line
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2

TABLE_ROWS, EVENT_LINES, TEXT_CHARACTERS = 20, 10, 40
_TABLE_LINES = 6
"""Of the table that are no requests."""
_STATE_AND_NUMBERS, _ANCHOR = 64, 16
"""Characters of a line that the columns after the request take, and the least that are of use for the model and the top
anchor each."""


def kinds(names: Sequence[str], everything: bool) -> list[str]:
    """Event kinds by name; empty for all findings. Raises ValueError that lists the valid names."""
    kind_numbers(names)
    return list(KINDS) if everything else list(names)


def plain_line(received: Received) -> str:
    """One event as one line: time, request, kind, severity, what; and at its end how many before it were lost."""
    event = received.event
    time = datetime.fromtimestamp(event.wall_time_ns / 1e9, UTC).isoformat(timespec="milliseconds")
    lost = f" ({received.lost} events before it were lost)" if received.lost else ""
    line = f"{time} {event.external_id} {_kind(event)} {_severity(event)} {event.summary}{lost}"
    return one_line(line, len(line))


def json_line(received: Received) -> str:
    """One event as one line of JSON; the ids stand at the top, enums by name, `lost` and `gap` where events were."""
    event = received.event
    fields = MessageToDict(event, preserving_proto_field_name=True)
    line = {
        "kind": _kind(event),
        "external_id": event.external_id,
        "request_id": event.key.request_id,
        "engine_instance": event.key.engine_instance,
        "sample_index": event.key.sample_index,
        **{name: value for name, value in fields.items() if name not in ("kind", "key", "external_id", "wall_time_ns")},
        "severity": _severity(event),
        "wall_time_ns": event.wall_time_ns,
        "cursor": received.cursor,
    }
    if received.lost:
        line["lost"] = received.lost
    if received.gap:
        line["gap"] = received.gap
    return json.dumps(line)


async def follow(target: Target, requests: Sequence[str], wanted: Sequence[str], as_json: bool) -> None:
    """Until cancelled; a table in a terminal alone, since a file or a pipe takes lines. Raises MonitorError."""
    async with AsyncMonitor(target) as monitor:
        events = monitor.subscribe(request_ids=requests, kinds=wanted, notify=_tell)
        if sys.stdout.isatty() and not as_json:
            await _table(monitor, events, requests)
            return
        async for received in events:
            print(json_line(received) if as_json else plain_line(received), flush=True)


def _tell(message: str) -> None:
    print(f"stream-monitor: {message}", file=sys.stderr, flush=True)


async def _table(monitor: AsyncMonitor, events: AsyncIterator[Received], requests: Sequence[str]) -> None:
    newest: deque[monitor_pb2.Event] = deque(maxlen=EVENT_LINES)

    async def collect() -> None:
        async for received in events:
            newest.append(received.event)

    collecting = asyncio.create_task(collect())
    try:
        with Live(refresh_per_second=4) as live:
            while not collecting.done():
                # Where it all finds no room on the screen, the end is left out.
                shown = (await _listed(monitor, requests))[: max(1, live.console.height - len(newest) - _TABLE_LINES)]
                live.update(Group(*map(_event_line, newest), _requests_table(shown, live.console.width)))
                await asyncio.sleep(0.5)
        collecting.result()
    finally:
        collecting.cancel()


async def _listed(monitor: AsyncMonitor, requests: Sequence[str]) -> list[monitor_pb2.RequestInfo]:
    found: list[monitor_pb2.RequestInfo] = []
    try:
        for request_id in requests or [""]:
            async for info in monitor.list_requests(request_id=request_id, page_size=TABLE_ROWS):
                found.append(info)
                if len(found) == TABLE_ROWS:
                    return found
    except MonitorError:
        return []  # The subscription has said so.
    return found


def _requests_table(requests: Sequence[monitor_pb2.RequestInfo], width: int) -> Table:
    """Where the screen is narrow, the model and the top anchor are left out, and long ids take several lines."""
    longest = max((len(info.external_id) for info in requests), default=0)
    wide = width >= longest + _STATE_AND_NUMBERS + 2 * _ANCHOR
    table = Table(title="Requests, newest first", box=None)
    table.add_column("request", no_wrap=wide, overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("tokens", "sentences", "rows", "events"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("model")
        table.add_column("top anchor")
    for info in requests:
        top = ""
        if info.HasField("top_anchor"):
            role = summary_pb2.Role.Name(info.top_anchor.sentence.role).removeprefix("ROLE_").lower()
            text = one_line(info.top_anchor.sentence.text, TEXT_CHARACTERS)
            top = f"#{info.top_anchor.sentence.index} {role} {info.top_anchor.share:.0%} {text}".rstrip()
        state = monitor_pb2.RequestState.Name(info.state).removeprefix("REQUEST_STATE_").lower()
        cells: list[str | Text] = [
            Text(info.external_id),
            Text(f"refused:\n{info.refused_reason}" if info.refused_reason else state),
            f"{info.prompt_tokens}+{info.output_tokens}",
            str(info.sentences),
            str(info.rows_kept),
            str(info.events),
        ]
        ends = [Text(end, no_wrap=True, overflow="ellipsis") for end in (info.model_name, top)]
        table.add_row(*cells, *ends * wide)
    return table


def _event_line(event: monitor_pb2.Event) -> Text:
    style = "yellow" if event.kind in FINDINGS else "dim"
    return Text(f"{_kind(event)} {event.external_id}: {event.summary}", style)


def _kind(event: monitor_pb2.Event) -> str:
    return monitor_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_")


def _severity(event: monitor_pb2.Event) -> str:
    return monitor_pb2.Severity.Name(event.severity).removeprefix("SEVERITY_")
