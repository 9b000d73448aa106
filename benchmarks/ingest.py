"""How many rows a second one monitor on one core takes in, and how long a finding takes to its subscribers.

A real `stream-monitor serve`, with its store, is pinned to one core. Everything else is pinned to the others: one
publisher that sends summaries serialised beforehand (`benchmarks.traffic`) over the monitor's Unix socket, as many
unanswered at a time as the product's own, and 50 subscribers, each on a connection of its own. Every request raises a
finding. First as fast as it goes, then at a part of that pace, on which the delays are judged.
"""

import asyncio
import math
import os
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import numpy as np
import typer

from benchmarks.monitor_process import Monitor, monitor
from benchmarks.report import Report, run
from benchmarks.subscribers import Heard, subscribers
from benchmarks.traffic import CAPTURE, REQUESTS, Shape, Traffic
from stream_monitor.publisher.backlog import WINDOW_BYTES, WINDOW_ENTRIES
from stream_monitor.v1alpha1 import ingest_pb2, monitor_pb2, monitor_pb2_grpc

SHAPES = {"default": Shape(layers=1, heads=32, tokens=2048), "full": Shape(layers=24, heads=16, tokens=512)}
"""At default settings a model of 32 query heads is watched in one layer; full capture is a whole model of 0.5B."""
ROWS_PER_SECOND = {"default": 20_000, "full": 2_000}
SUBSCRIBERS = 50
PACE = 0.7
"""Of the rows a second that were taken in at most."""
DELAY_SECONDS, MIB_PER_MINUTE, ROW_BYTES = 0.25, 1.0, 2_000
LIMITS = {"max_trace_bytes": 128 << 20, "store_bytes": 128 << 20, "event_log": 4096}
"""So that memory is full, and what is oldest goes, long before it is measured."""
LIMITED = 0.9
"""Of a core: a publisher that takes more is what is measured."""
_PUBLISH = "/stream_monitor.v1alpha1.IngestService/Publish"


@dataclass
class Sent:
    """What a publisher sent in a time.

    Attributes:
        times: Unix time in nanoseconds of each message, which is that of its step.
        unanswered: bytes, at the end none.
        seconds: it took. publisher, monitor: processor time of both in it.
        resident: the monitor's memory, seconds and bytes, about once a second.
    """

    rows: int = 0
    messages: int = 0
    bytes: int = 0
    times: list[int] = field(default_factory=list)
    unanswered: int = 0
    seconds: float = 0.0
    publisher: float = 0.0
    monitor: float = 0.0
    resident: list[tuple[float, int]] = field(default_factory=list)

    @property
    def mib_per_minute(self) -> float:
        """By which the memory grew, least squares."""
        at, held = np.array(self.resident, float).T
        return float(np.polyfit(at / 60, held / (1 << 20), 1)[0])


class Publisher:
    """One stream, which goes on where it stopped: the traffic of one engine."""

    def __init__(self, running: Monitor, traffic: Traffic) -> None:
        self._running = running
        self._messages = traffic.endless()
        self._step = 0

    def send(self, seconds: float, rows_per_second: float | None = None) -> Sent:
        """Send for so long, as fast as answers come or at a pace."""
        return asyncio.run(self._send(seconds, rows_per_second))

    async def _send(self, seconds: float, pace: float | None) -> Sent:
        sent = Sent()
        answered = asyncio.Event()
        unanswered: deque[int] = deque()
        async with grpc.aio.insecure_channel(self._running.ingest) as channel:
            publish: grpc.aio.StreamStreamMultiCallable[bytes, ingest_pb2.PublishResponse] = channel.stream_stream(
                _PUBLISH, response_deserializer=ingest_pb2.PublishResponse.FromString
            )
            call = publish()

            async def settle() -> None:
                async for answer in call:
                    assert answer.outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED, answer
                    sent.unanswered -= unanswered.popleft()
                    answered.set()

            settling = asyncio.create_task(settle())
            begun, own, theirs = time.monotonic(), time.process_time(), self._running.cpu_seconds
            while (now := time.monotonic() - begun) < seconds and not settling.done():
                if pace is not None and sent.rows / pace > now:
                    await asyncio.sleep(sent.rows / pace - now)
                if len(sent.resident) <= now:
                    sent.resident.append((now, self._running.resident_bytes))
                while sent.unanswered >= WINDOW_BYTES or len(unanswered) >= WINDOW_ENTRIES:
                    answered.clear()
                    await answered.wait()
                message, cycle, sequence = next(self._messages)
                self._step += 1
                sent.times.append(time.time_ns())
                raw = message.stamped(cycle, sequence, self._step, sent.times[-1])
                unanswered.append(len(raw))
                sent.unanswered += len(raw)
                await call.write(raw)
                sent.rows += message.rows
                sent.messages += 1
                sent.bytes += len(raw)
            await call.done_writing()
            await settling
        sent.seconds = time.monotonic() - begun
        sent.publisher, sent.monitor = time.process_time() - own, self._running.cpu_seconds - theirs
        return sent


def main(
    shape: Annotated[list[str] | None, typer.Option(help="default or full; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=5.0, help="Of each run; twice that where memory is watched.")] = 30.0,
    core: Annotated[int, typer.Option(help="On which the monitor runs.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the rows.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="10 minutes of the paced run at default settings.")] = False,
) -> None:
    """Rows a second, bytes a second, and how long a finding takes."""
    others = os.sched_getaffinity(0) - {core}
    if not others:
        raise typer.BadParameter("needs two cores: one for the monitor, one for what it serves")
    wanted = shape or list(SHAPES)
    if unknown := set(wanted) - set(SHAPES):
        raise typer.BadParameter(f"{unknown.pop()} is none of {', '.join(SHAPES)}", param_hint="--shape")
    os.sched_setaffinity(0, others)
    report = Report(
        benchmark="ingest",
        config={
            "shapes": {name: [SHAPES[name].layers, SHAPES[name].heads, SHAPES[name].tokens] for name in wanted},
            "requests": REQUESTS,
            "stride": CAPTURE.stride,
            "top_k": CAPTURE.top_k,
            "subscribers": SUBSCRIBERS,
            "seconds": seconds,
            "limits": LIMITS,
            "full": full,
        },
        seed=seed,
        n=0,
    )
    for name in wanted:
        _measure(name, report, seconds, 600.0 if full else 2 * seconds, core)
    report.finish()


def _measure(name: str, report: Report, seconds: float, paced_seconds: float, core: int) -> None:
    traffic = Traffic(SHAPES[name], report.seed)
    print(f"{name}: {traffic.row_bytes:,.0f} bytes a row")
    with (
        tempfile.TemporaryDirectory() as folder,
        monitor(Path(folder), core, **LIMITS) as running,
        subscribers(running.grpc, SUBSCRIBERS, min(os.sched_getaffinity(0))) as listening,
    ):
        publisher = Publisher(running, traffic)
        # The first requests are joined late: their beginnings were a cycle before.
        publisher.send(seconds / 2)
        listening.heard()
        fast = publisher.send(seconds)
        pace = fast.rows / fast.seconds
        _tell(name, "at most", fast, listening.heard(), report)
        report.figures[f"{name}/row_bytes"] = traffic.row_bytes
        report.figures[f"{name}/rows_per_cpu_second"] = fast.rows / fast.monitor
        report.must[f"{name}/at most/rows_per_second"] = (">=", ROWS_PER_SECOND[name])
        paced = publisher.send(paced_seconds if name == "default" else seconds, PACE * pace)
        _tell(name, "paced", paced, listening.heard(), report)
        report.must[f"{name}/paced/p99_seconds"] = ("<=", DELAY_SECONDS)
        if name == "default":
            report.must[f"{name}/row_bytes"] = ("<=", ROW_BYTES)
            report.figures[f"{name}/mib_per_minute"] = paced.mib_per_minute
            report.must[f"{name}/mib_per_minute"] = ("<=", MIB_PER_MINUTE)
            print(f"  memory: {paced.resident[-1][1] / (1 << 20):.0f} MiB, {paced.mib_per_minute:+.2f} MiB a minute")
        report.figures[f"{name}/checked_requests"] = _checked(running, SHAPES[name])
        report.must[f"{name}/checked_requests"] = (">=", 1)


def _tell(name: str, how: str, sent: Sent, heard: Heard, report: Report) -> None:
    p50, p99 = (float(np.quantile(heard.delays, part)) if heard.delays else math.nan for part in (0.5, 0.99))
    figures = {
        "rows_per_second": sent.rows / sent.seconds,
        "bytes_per_second": sent.bytes / sent.seconds,
        "monitor_cpu": sent.monitor / sent.seconds,
        "publisher_cpu": sent.publisher / sent.seconds,
        "findings_per_second": heard.events / sent.seconds,
        "p50_seconds": p50,
        "p99_seconds": p99,
        "lost": heard.lost,
    }
    report.figures |= {f"{name}/{how}/{figure}": value for figure, value in figures.items()}
    report.n += len(heard.delays)
    print(
        f"  {how}: {figures['rows_per_second']:,.0f} rows a second, {figures['bytes_per_second'] / 1e6:.1f} MB/s; "
        f"{figures['findings_per_second']:.1f} findings a second to each of {SUBSCRIBERS}, after "
        f"{1e3 * p50:.0f} ms (median), {1e3 * p99:.0f} ms (99%); processor: monitor {figures['monitor_cpu']:.0%}, "
        f"publisher {figures['publisher_cpu']:.0%}"
    )
    if figures["publisher_cpu"] > LIMITED:
        print("  the publisher is at its limit: the monitor may take more")


def _checked(running: Monitor, shape: Shape) -> int:
    """How many requests began and ended; each of them must have all of its rows, and a finding."""
    with grpc.insecure_channel(running.grpc) as channel:
        api = monitor_pb2_grpc.MonitorServiceStub(channel)
        held = api.ListRequests(monitor_pb2.ListRequestsRequest(page_size=200), timeout=60).requests
    ended = [info for info in held if info.state == monitor_pb2.REQUEST_STATE_FINISHED and not info.joined_late]
    for info in ended:
        assert info.rows_kept == shape.rows, info
        assert info.events, info
    return len(ended)


if __name__ == "__main__":
    run(main)
