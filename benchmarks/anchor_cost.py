"""What the monitor spends on an output as it grows, and how many tokens a second one core keeps up with.

Summaries as an engine at default settings sends them (rows of drawn attention, most of it on few tokens) go through the
monitor's own code, from the bytes of a message to findings: decoding, merging, sentences, the sentence matrix, all
detectors, events. Nothing is read from a network.
"""

import gc
import resource
from collections.abc import Iterator
from statistics import median
from typing import Annotated

import numpy as np
import typer

from benchmarks.report import Report, bootstrap, run
from stream_monitor.config import CaptureSettings, MonitorSettings
from stream_monitor.monitor.calibration import Calibration
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.intake import Intake, Stream
from stream_monitor.monitor.merge import Merger
from stream_monitor.monitor.metrics import Metrics
from stream_monitor.monitor.pipeline import Pipeline
from stream_monitor.monitor.ranks import RankBook
from stream_monitor.monitor.store import TraceStore
from stream_monitor.monitor.text import Vocabularies
from stream_monitor.publisher.convert import SCHEMA_VERSION
from stream_monitor.v1alpha1 import ingest_pb2, summary_pb2

CAPTURE = CaptureSettings()
HEADS = CAPTURE.max_heads
LAYERS = 4
SENTENCE_TOKENS = 24
PROMPT_TOKENS = 480
SIZES = (100, 1_000, 10_000)
WINDOW = 50
"""Sentences timed from each size on."""
GROWTH, TOKENS_PER_SECOND = 1.5, 20_000
FLAGS = bytes([2] * (SENTENCE_TOKENS - 1) + [1])
"""Words, each after a space, and a full stop."""
_ANY_RATE = 1 << 40
"""Messages a second that are taken in: a monitor's own limit is for those that come over time."""


def main(
    sizes: Annotated[list[int] | None, typer.Option(help="Sentences; may be repeated, ascending.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests side by side in the throughput run.")] = 32,
    seconds: Annotated[float, typer.Option(min=1.0, help="Of the throughput run.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the rows.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Each size three times, a minute of throughput.")] = False,
) -> None:
    """Time per token and per closed sentence, and tokens per second."""
    wanted = tuple(sizes or SIZES)
    runs = 3 if full else 1
    report = Report(
        benchmark="anchor_cost",
        config={
            "stride": CAPTURE.stride,
            "heads": HEADS,
            "top_k": CAPTURE.top_k,
            "sentence_tokens": SENTENCE_TOKENS,
            "sizes": list(wanted),
            "requests": requests,
            "full": full,
        },
        seed=seed,
        n=runs * WINDOW,
    )
    spent: dict[int, list[float]] = {size: [] for size in wanted}
    for number in range(runs):
        for size, times in _growing(wanted, seed + number):
            spent[size] += times
    for size, times in spent.items():
        report.figures[f"us_per_sentence/{size}"] = 1e6 * median(times)
        report.figures[f"us_per_token/{size}"] = 1e6 * median(times) / SENTENCE_TOKENS
        report.ci[f"us_per_sentence/{size}"] = bootstrap({str(i): [1e6 * t] for i, t in enumerate(times)}, seed, median)
        print(f"{size:>7,} sentences: {1e6 * median(times):7.0f} us a sentence of {SENTENCE_TOKENS} tokens")
    for size in wanted[1:]:
        growth = median(spent[size]) / median(spent[wanted[0]])
        report.figures[f"growth/{size}"] = growth
        report.must[f"growth/{size}"] = ("<=", GROWTH)
    pace = _throughput(requests, 6 * seconds if full else seconds, seed)
    report.figures["tokens_per_second"] = pace
    report.must["tokens_per_second"] = (">=", TOKENS_PER_SECOND)
    print(f"{requests} requests side by side: {pace:,.0f} tokens a second of processor time")
    report.finish()


class DrawnEngine:
    """One rank that sends what was drawn."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.sequence = self.step = 0
        self.info = summary_pb2.EngineInfo(
            instance="00000000-0000-0000-0000-000000000000",
            model_name="drawn",
            engine="0",
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            layers=range(LAYERS),
            query_heads=range(HEADS // LAYERS),
            total_query_heads=HEADS // LAYERS,
            geometry=summary_pb2.BlockGeometry(
                block_size=CAPTURE.block_size,
                top_k=CAPTURE.top_k,
                sink_blocks=CAPTURE.sink_blocks,
                recent_blocks=CAPTURE.recent_blocks,
                strategy=CAPTURE.strategy,
            ),
        )

    def message(self, positions: dict[str, int], **more: object) -> bytes:
        """A step with one row for each request that has a position."""
        self.sequence += 1
        fields: dict[str, object] = {"schema_version": SCHEMA_VERSION, "engine": self.info, "sequence": self.sequence}
        if positions:
            self.step += 1
            fields |= {"step": self.step, "rows": self._rows(positions)}
        summary = summary_pb2.StepSummary(**(fields | more))  # type: ignore[arg-type]  # protobuf takes fields by name
        return ingest_pb2.PublishRequest(summary=summary).SerializeToString()

    def _rows(self, positions: dict[str, int]) -> summary_pb2.Rows:
        count, blocks = len(positions), CAPTURE.sink_blocks + CAPTURE.recent_blocks
        lead = (count, LAYERS, HEADS // LAYERS)
        at = np.array(list(positions.values()))
        inner = at // CAPTURE.block_size - CAPTURE.recent_blocks
        ranks = self.draw.zipf(1.3, (*lead, CAPTURE.top_k)) % inner[:, None, None, None]
        shares = self.draw.dirichlet(np.full(CAPTURE.top_k + blocks + 1, 0.5), lead)
        log = np.log(np.maximum(shares, 1e-5)).astype("<f2")
        # Of the row's own block no key may lie behind the row.
        strongest = self.draw.integers(0, CAPTURE.block_size, (*lead, blocks), np.uint8)
        strongest[..., -1] = (at % CAPTURE.block_size)[:, None, None]
        return summary_pb2.Rows(
            count=count,
            request_ids=list(positions),
            positions=at.astype("<u4").tobytes(),
            attempts=np.zeros(count, "<u4").tobytes(),
            phases=np.full(count, summary_pb2.PHASE_DECODE, "u1").tobytes(),
            narrow_block_ids=(CAPTURE.sink_blocks + ranks).astype("<u2").tobytes(),
            block_log_share=log[..., : CAPTURE.top_k].tobytes(),
            block_strongest=self.draw.integers(0, CAPTURE.block_size, ranks.shape, np.uint8).tobytes(),
            forced_log_share=log[..., CAPTURE.top_k : -1].tobytes(),
            forced_strongest=strongest.tobytes(),
            unobserved_log_share=log[..., -1].tobytes(),
            total_lse=np.zeros(lead, "<f4").tobytes(),
            keys_read=np.zeros(lead[:2], "<f4").tobytes(),
        )

    def begin(self, names: list[str]) -> bytes:
        starts = [
            summary_pb2.RequestStarted(
                request_id=name,
                prompt_tokens=PROMPT_TOKENS,
                role_starts=np.array([0], "<u4").tobytes(),
                roles=bytes([summary_pb2.ROLE_USER]),
                prompt_flags=FLAGS * (PROMPT_TOKENS // SENTENCE_TOKENS),
            )
            for name in names
        ]
        return self.message({}, started=starts)

    def sentence(self, names: list[str], position: int) -> list[bytes]:
        """The steps of one more sentence of every request: a token each, and a row in every `stride`."""
        return [
            self.message(
                dict.fromkeys(names, position + token) if token % CAPTURE.stride == 0 else {},
                tokens=[
                    summary_pb2.TokenRun(
                        request_id=name, first_position=position + token, flags=FLAGS[token : token + 1]
                    )
                    for name in names
                ],
            )
            for token in range(SENTENCE_TOKENS)
        ]


def _monitor() -> Intake:
    settings = MonitorSettings(max_sentences=2 * max(SIZES))
    ranks = RankBook(settings.max_engines)
    store = TraceStore(settings.max_traces, settings.max_trace_bytes, settings.max_sentences)
    log = EventLog(settings.event_log, settings.subscriber_queue, settings.max_subscribers)
    calibration = Calibration()
    metrics = Metrics()
    pipeline = Pipeline(store, log, metrics, calibration, Vocabularies({}))
    merger = Merger(settings.merge_deadline_seconds)
    return Intake(ranks, merger, pipeline, metrics, settings.max_message_bytes, _ANY_RATE)


def _growing(sizes: tuple[int, ...], seed: int) -> Iterator[tuple[int, list[float]]]:
    """Processor seconds of each of `WINDOW` sentences of one request, once it has so many."""
    engine, monitor = DrawnEngine(seed), _Run(_monitor())
    monitor.take(engine.begin(["r"]))
    prompt = PROMPT_TOKENS // SENTENCE_TOKENS
    position = PROMPT_TOKENS
    for size in sizes:
        while position // SENTENCE_TOKENS < max(size, prompt):
            for message in engine.sentence(["r"], position):
                monitor.take(message)
            position += SENTENCE_TOKENS
        times = []
        gc.collect()
        for _ in range(WINDOW):
            messages = engine.sentence(["r"], position)
            before = _processor_seconds()
            for message in messages:
                monitor.take(message)
            times.append(_processor_seconds() - before)
            position += SENTENCE_TOKENS
        yield size, times


def _throughput(requests: int, seconds: float, seed: int) -> float:
    """Tokens per processor second of many requests at a time."""
    engine, monitor = DrawnEngine(seed), _Run(_monitor())
    names = [f"r{number}" for number in range(requests)]
    monitor.take(engine.begin(names))
    position, tokens, spent = PROMPT_TOKENS, 0, 0.0
    while spent < seconds:
        messages = engine.sentence(names, position)
        before = _processor_seconds()
        for message in messages:
            monitor.take(message)
        spent += _processor_seconds() - before
        position += SENTENCE_TOKENS
        tokens += SENTENCE_TOKENS * requests
    return tokens / spent


class _Run:
    """A monitor that one stream of messages goes into; each of them must be accepted."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._stream = Stream()

    def take(self, message: bytes) -> None:
        (answer,) = self._intake.take([message], self._stream)
        assert answer.outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED, answer
        self._intake.score()


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    run(main)
