"""What a monitor holds of each request: memory, and bytes on the wire and in its store.

A real `stream-monitor serve` takes in finished requests of drawn rows, as an engine at default settings sends them (see
`benchmarks.anchor_cost`); then it is asked for its own figures. Each size has a monitor of its own.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import grpc
import typer

from benchmarks.anchor_cost import CAPTURE, HEADS, PROMPT_TOKENS, SENTENCE_TOKENS, DrawnEngine
from benchmarks.monitor_process import monitor
from benchmarks.report import Report, run
from stream_monitor.v1alpha1 import ingest_pb2, summary_pb2

SIZES = (500, 4_000)
TOGETHER = 10
"""Requests that run side by side, and so share messages."""

Figures = dict[str, float]


def main(
    sizes: Annotated[list[int] | None, typer.Option(help="Output tokens of a request; may be repeated.")] = None,
    requests: Annotated[int, typer.Option(min=TOGETHER, help="Requests of each size.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the rows.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Five times as many requests.")] = False,
) -> None:
    """Bytes of a request in the monitor."""
    count = requests * (5 if full else 1)
    wanted = tuple(sizes or SIZES)
    report = Report(
        benchmark="monitor_size",
        config={"sizes": list(wanted), "requests": count, "stride": CAPTURE.stride, "heads": HEADS, "full": full},
        seed=seed,
        n=count,
    )
    for size in wanted:
        measured = _measure(size, count, seed)
        report.figures |= {f"{name}/{size}": value for name, value in measured.items()}
        print(
            f"{size:>6,} output tokens: {measured['resident_bytes'] / 1024:7.1f} KiB resident, of which "
            f"{measured['counted_bytes'] / 1024:7.1f} KiB counted as traces; {measured['wire_bytes'] / 1024:7.1f} KiB "
            f"on the wire; {measured['stored_bytes'] / 1024:7.1f} KiB in the store"
        )
    report.figures["empty_resident_bytes"] = _measure(0, 0, seed)["resident_bytes"]
    print(f"a monitor without requests: {report.figures['empty_resident_bytes'] / (1 << 20):.0f} MiB resident")
    report.finish()


def _measure(size: int, count: int, seed: int) -> Figures:
    """Bytes of one request, by name; of the whole monitor if `count` is 0."""
    with tempfile.TemporaryDirectory() as folder:
        with monitor(Path(folder)) as running:
            before = running.settled_metrics()
            if not count:
                return {"resident_bytes": before["process_resident_memory_bytes"]}
            _publish(running.ingest, size, count, seed)
            after = running.settled_metrics()
        assert after["stream_monitor_traces"] == count, "traces were evicted: fewer requests, please"
        # Closed, the store is one file.
        stored = sum(file.stat().st_size for file in Path(folder).glob("stream-monitor/monitor.db*"))
    grown = {
        "resident_bytes": "process_resident_memory_bytes",
        "counted_bytes": "stream_monitor_traces_bytes",
        "wire_bytes": "stream_monitor_message_bytes_total",
    }
    figures = {name: (after[metric] - before[metric]) / count for name, metric in grown.items()}
    return figures | {"stored_bytes": stored / count}


def _publish(ingest: str, size: int, count: int, seed: int) -> None:
    """`count` requests, each finished, `TOGETHER` at a time."""
    engine = DrawnEngine(seed)

    def messages() -> Iterator[bytes]:
        for first in range(0, count, TOGETHER):
            names = [f"chatcmpl-{number:08x}-aee6d49e" for number in range(first, min(first + TOGETHER, count))]
            yield engine.begin(names)
            for position in range(PROMPT_TOKENS, PROMPT_TOKENS + size, SENTENCE_TOKENS):
                yield from engine.sentence(names, position)
            total = PROMPT_TOKENS + -(-size // SENTENCE_TOKENS) * SENTENCE_TOKENS
            ends = [summary_pb2.RequestFinished(request_id=name, total_tokens=total) for name in names]
            yield engine.message({}, finished=ends)

    with grpc.insecure_channel(ingest) as channel:
        publish: grpc.StreamStreamMultiCallable[bytes, ingest_pb2.PublishResponse] = channel.stream_stream(
            "/stream_monitor.v1alpha1.IngestService/Publish",
            request_serializer=None,
            response_deserializer=ingest_pb2.PublishResponse.FromString,
        )
        for answer in publish(messages()):
            assert answer.outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED, answer.reason


if __name__ == "__main__":
    run(main)
