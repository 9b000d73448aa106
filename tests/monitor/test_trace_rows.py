"""What a trace says of random rows is what plain loops over the contract's definitions say."""

import uuid
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from stream_monitor.compiled.periods import FAR_KEYS, LEAST_LAG, MOST_LAG
from stream_monitor.config import MonitorSettings
from stream_monitor.monitor import views
from stream_monitor.monitor.calibration import Calibration
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.faults import Fault
from stream_monitor.monitor.intake import Intake, Stream
from stream_monitor.monitor.merge import Merger
from stream_monitor.monitor.metrics import Metrics
from stream_monitor.monitor.pipeline import Pipeline
from stream_monitor.monitor.ranks import RankBook
from stream_monitor.monitor.rows import FAR_KEY, _far_keys, decode
from stream_monitor.monitor.sentence_matrix import Captured
from stream_monitor.monitor.store import TraceStore
from stream_monitor.monitor.text import Vocabularies
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.v1alpha1 import ingest_pb2, summary_pb2
from tests.monitor import synthetic

LAYERS, HEADS = (3, 5), (0, 2, 3)
PROMPT, OUTPUT = 60, 96
POSITIONS = range(PROMPT - 1, PROMPT + OUTPUT - 1, 2)
SENTENCE = len(synthetic.SENTENCE)

Entry = tuple[int, int, int, float]
"""Position of the row, place of the head, key, mass."""


def intake() -> Intake:
    settings = MonitorSettings()
    log = EventLog(settings.event_log, settings.subscriber_queue, settings.max_subscribers)
    store = TraceStore(settings.max_traces, settings.max_trace_bytes, settings.max_sentences)
    metrics = Metrics()
    pipeline = Pipeline(store, log, metrics, Calibration(), Vocabularies({}))
    return Intake(RankBook(8), Merger(5.0), pipeline, metrics, settings.max_message_bytes)


def drawn_rows(
    request_id: str, positions: list[int], info: summary_pb2.EngineInfo, draw: np.random.Generator
) -> tuple[summary_pb2.Rows, list[Entry]]:
    """Rows whose heads look at random keys, some of them the same ones, and what they say entry by entry."""
    geometry = info.geometry
    size, sink, recent = geometry.block_size, geometry.sink_blocks, geometry.recent_blocks
    lead = (len(positions), len(info.layers), len(info.query_heads))
    ids = np.full((*lead, geometry.top_k), 0xFFFFFFFF, "<u4")
    forced_ids = np.full((len(positions), sink + recent), -1)
    offsets = draw.integers(0, size, (*lead, geometry.top_k + sink + recent)).astype(np.uint8)
    shares = draw.dirichlet(np.full(geometry.top_k + sink + recent + 1, 0.4), lead)
    for row, position in enumerate(positions):
        own = position // size
        forced_ids[row, :sink] = np.arange(sink)
        forced_ids[row, sink:] = np.arange(own + 1 - recent, own + 1)
        for layer, head in np.ndindex(lead[1:]):
            inner = draw.permutation(np.arange(sink, own + 1 - recent))[: geometry.top_k]
            ids[row, layer, head, : len(inner)] = inner
            shares[row, layer, head, len(inner) : geometry.top_k] = 0
        offsets[row, ..., -1] = np.minimum(offsets[row, ..., -1], position % size)
    shares /= shares.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        log = np.log(shares).astype("<f2")
    rows = summary_pb2.Rows(
        count=len(positions),
        request_ids=[request_id] * len(positions),
        positions=np.array(positions, "<u4").tobytes(),
        attempts=np.zeros(len(positions), "<u4").tobytes(),
        phases=bytes([summary_pb2.PHASE_DECODE] * len(positions)),
        block_ids=ids.tobytes(),
        block_log_share=log[..., : geometry.top_k].tobytes(),
        block_strongest=offsets[..., : geometry.top_k].tobytes(),
        forced_log_share=log[..., geometry.top_k : -1].tobytes(),
        forced_strongest=offsets[..., geometry.top_k :].tobytes(),
        unobserved_log_share=log[..., -1].tobytes(),
        total_lse=np.zeros(lead, "<f4").tobytes(),
        keys_read=np.zeros(lead[:2], "<f4").tobytes(),
    )
    blocks = np.concatenate(
        [ids.astype(np.int64), np.broadcast_to(forced_ids[:, None, None], (*lead, sink + recent))], -1
    )
    entries = [
        (positions[row], layer * lead[2] + head, int(blocks[row, layer, head, block]) * size + int(offset), float(mass))
        for (row, layer, head, block), offset in np.ndenumerate(offsets)
        if (mass := np.exp(np.float64(log[row, layer, head, block]))) > 0
    ]
    return rows, entries


def conversation(seed: int) -> tuple[list[summary_pb2.StepSummary], list[Entry]]:
    """A request whose steps carry a row and two tokens each."""
    draw = np.random.default_rng(seed)
    sender = synthetic.Engine(synthetic.engine(str(uuid.UUID(int=seed)), LAYERS, HEADS))
    summaries = [sender.summary(started=[synthetic.started("r", PROMPT)])]
    entries: list[Entry] = []
    flags = synthetic.SENTENCE * (OUTPUT // SENTENCE)
    for position in POSITIONS:
        rows, more = drawn_rows("r", [position], sender.info, draw)
        token = position + 1 - PROMPT
        run = synthetic.tokens("r", position + 1, flags[token : token + 2])
        summary = sender.summary(rows=rows, tokens=[run])
        summary.step = sender.step = sender.step + 1
        summaries.append(summary)
        entries += more
    return [*summaries, sender.summary(finished=[synthetic.finished("r", PROMPT + OUTPUT)])], entries


def served(summaries: list[summary_pb2.StepSummary], together: int) -> RequestTrace:
    """The trace, where so many messages are taken in at a time."""
    taking, stream = intake(), Stream()
    raw = [ingest_pb2.PublishRequest(summary=summary).SerializeToString() for summary in summaries]
    for first in range(0, len(raw), together):
        answers = taking.take(raw[first : first + together], stream)
        assert stream.fault is None
        assert all(answer.outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED for answer in answers)
        taking.score()
    trace = taking.pipeline.store.get(summaries[0].engine.instance, "r")
    assert trace is not None
    return trace


@pytest.mark.parametrize("seed", range(3))
def test_the_matrix_is_the_mean_over_heads_and_rows_of_each_sentence(seed: int) -> None:
    summaries, entries = conversation(seed)
    trace = served(summaries, together=5)
    heads = len(LAYERS) * len(HEADS)
    rows_of = defaultdict(set)
    matrix: dict[tuple[int, int], float] = defaultdict(float)
    by_head: dict[tuple[int, int, int], float] = defaultdict(float)
    for position, head, key, mass in entries:
        row = position // SENTENCE
        rows_of[row].add(position)
        matrix[row, key // SENTENCE] += mass
        if key:
            by_head[row, head, key // SENTENCE] += mass
    # The row of the prompt's last token lies in its last sentence, which is not scored.
    first = PROMPT // SENTENCE
    found = trace.matrix()
    for row, positions in rows_of.items():
        mine = found.rows == row
        assert found.captured[row] == len(positions)
        columns = {column: mass / heads / len(positions) for (at, column), mass in matrix.items() if at == row}
        told_of = zip(found.columns[mine].tolist(), found.shares[mine].tolist(), strict=True)
        assert dict(told_of) == pytest.approx(columns, rel=1e-5)
        shares = trace.heads.of(row)
        told = zip(shares.heads.tolist(), shares.columns.tolist(), shares.shares.tolist(), strict=True)
        expected = {
            (head, column): mass / len(positions) for (at, head, column), mass in by_head.items() if at == row >= first
        }
        assert {(head, column): share for head, column, share in told} == pytest.approx(expected, rel=1e-5)


def heaviest(far: dict[int, float]) -> dict[int, float]:
    return dict(sorted(far.items(), key=lambda key: -key[1])[:FAR_KEYS])


@pytest.mark.parametrize("seed", range(3))
def test_the_far_keys_are_the_heaviest_ones(seed: int) -> None:
    summaries, entries = conversation(seed)
    trace = served(summaries, together=3)
    far: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for position, _, key, mass in entries:
        if 4 <= key <= position - LEAST_LAG:
            far[position][position - key] += mass
    for sentence in range(PROMPT // SENTENCE, (PROMPT + OUTPUT) // SENTENCE):
        positions = [position for position in POSITIONS if position // SENTENCE == sentence]
        found = Captured.of([held for position in positions if (held := trace.rows.held(position))])
        for position, lags, mass in zip(positions, found.lags.tolist(), found.lag_mass.tolist(), strict=True):
            # Equal masses may stand in either order.
            assert dict(zip(lags, mass, strict=True)) == pytest.approx(heaviest(far[position]), rel=1e-5)
            assert mass == sorted(mass, reverse=True)


def test_far_keys_are_none_of_what_is_near_or_first_or_beyond() -> None:
    position, draw = 3000, np.random.default_rng(0)
    lags = np.array([[0, LEAST_LAG - 1, LEAST_LAG, 500, MOST_LAG, MOST_LAG + 1, position - 3, position]] * 7)
    mass = draw.random(lags.shape).astype(np.float32)
    mass[:, 3] = 0
    found = _far_keys((position - lags).astype(np.uint32), mass, np.full(7, position))
    assert len(found) == 7
    for row, told in enumerate(found):
        keys = np.frombuffer(told, FAR_KEY)
        expected = heaviest({LEAST_LAG: mass[row, 2].item(), MOST_LAG: mass[row, 4].item()})
        assert keys["lag"].tolist() == [*expected] + [0] * (FAR_KEYS - 2)
        assert keys["mass"].tolist() == [*expected.values()] + [0.0] * (FAR_KEYS - 2)


def test_far_keys_of_two_ranks_are_added_up() -> None:
    """Of ranks that look at few keys each, it is as if one rank had captured all heads."""
    draw = np.random.default_rng(0)
    info = synthetic.engine("joined", LAYERS, HEADS)
    rows, _ = drawn_rows("r", [90], info, draw)
    (row,) = decode(rows, info, ())
    keys = draw.choice(row.keys[(row.keys >= 4) & (row.keys <= 90 - LEAST_LAG)], (2, FAR_KEYS - 3))
    keys[1, :2] = keys[0, :2]
    mass = draw.random(keys.shape).astype(np.float32)
    one, other = (replace(row, far_keys=raw) for raw in _far_keys(keys, mass, np.array([90, 90])))
    (together,) = _far_keys(keys.reshape(1, -1), mass.reshape(1, -1), np.array([90]))
    joined, whole = (np.frombuffer(raw, FAR_KEY) for raw in (one.joined(other).far_keys, together))
    assert joined["lag"].tolist() == whole["lag"].tolist()
    assert joined["mass"] == pytest.approx(whole["mass"])
    assert 0 < np.count_nonzero(joined["mass"]) <= FAR_KEYS


@pytest.mark.parametrize("seed", range(3))
def test_how_many_messages_are_taken_in_together_changes_nothing(seed: int) -> None:
    summaries, _ = conversation(seed)
    for summary in summaries:
        summary.wall_time_ns = 1 << 60
    alone = views.full(served(summaries, together=1), with_heads=True)
    assert len(alone.matrix_share) > 0
    assert len(alone.head_share) > 0
    for together in (2, 7, len(summaries)):
        assert views.full(served(summaries, together), with_heads=True) == alone


def test_a_sentence_that_cannot_be_scored_takes_none_of_another_request_along(monkeypatch: pytest.MonkeyPatch) -> None:
    taking = intake()
    both = [conversation(seed)[0] for seed in (1, 2)]
    native = taking.pipeline._score

    def score(trace: RequestTrace, *rest: object) -> None:
        if trace.instance == both[0][0].engine.instance:
            raise ValueError("a fault of ours")
        native(trace, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(taking.pipeline, "_score", score)
    for summaries in both:
        for summary in summaries:
            summary.wall_time_ns = 1 << 60
        taking.take([ingest_pb2.PublishRequest(summary=summary).SerializeToString() for summary in summaries], Stream())
    with pytest.raises(ValueError, match="a fault of ours"):
        taking.score()
    other = taking.pipeline.store.get(both[1][0].engine.instance, "r")
    assert other is not None
    assert views.full(other, with_heads=True) == views.full(served(both[1], together=len(both[1])), with_heads=True)


def narrowed(rows: summary_pb2.Rows) -> None:
    """Its block ids in 16 bits."""
    rows.narrow_block_ids = np.frombuffer(rows.block_ids, "<u4").astype("<u2").tobytes()
    rows.ClearField("block_ids")


@pytest.mark.parametrize("every", [1, 2])
def test_the_width_of_block_ids_changes_nothing(every: int) -> None:
    summaries, _ = conversation(0)
    for summary in summaries:
        summary.wall_time_ns = 1 << 60
    wide = views.full(served(summaries, together=7), with_heads=True)
    for summary in summaries[::every]:
        if summary.HasField("rows"):
            narrowed(summary.rows)
    assert views.full(served(summaries, together=7), with_heads=True) == wide


def test_no_block_is_none_where_a_context_is_long_enough_to_have_it() -> None:
    sender = synthetic.Engine(synthetic.engine(layers=LAYERS, heads=HEADS))
    own = 0xFFFF + 100
    rows, _ = drawn_rows("r", [(own + 1) * synthetic.BLOCK - 1], sender.info, np.random.default_rng(0))
    ids = np.frombuffer(rows.block_ids, "<u4").copy()
    ids[0] = 0xFFFF
    rows.block_ids = ids.tobytes()
    (row,) = decode(rows, sender.info, ())
    assert row.keys[0] // synthetic.BLOCK == 0xFFFF
    ids[:] = np.minimum(ids, 0xFFFF)
    rows.block_ids = ids.tobytes()
    narrowed(rows)
    with pytest.raises(Fault, match="a block with mass, or its strongest key, lies outside"):
        decode(rows, sender.info, ())


def test_a_fault_ends_the_stream_where_it_is_and_what_came_before_counts() -> None:
    summaries, _ = conversation(0)
    summaries[4].rows.positions = b"\0"
    taking, stream = intake(), Stream()
    raw = [ingest_pb2.PublishRequest(summary=summary).SerializeToString() for summary in summaries]
    answers = taking.take(raw, stream)
    assert [answer.sequence for answer in answers] == [1, 2, 3, 4]
    assert stream.fault is not None
    assert str(stream.fault) == "rows.positions has 1 bytes; shape [1] of <u4 has 4"
    (rank,) = taking.ranks.ranks.values()
    assert rank.sequence == 4
    trace = taking.pipeline.store.get(summaries[0].engine.instance, "r")
    assert trace is not None
    assert trace.token_rows == 3
