"""Summaries of many requests at a time, serialised beforehand, so that a load generator does no more than send them.

Each of `REQUESTS` places holds one request after another; all are equally far apart in their course, as those of a busy
engine are. One cycle, in which every place begins one request, is drawn and serialised once. It is sent again and again
with other request ids, sequence and step numbers and times, which are written into the bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stream_monitor.anchors.matrix import NO_BLOCK
from stream_monitor.config import CaptureSettings
from stream_monitor.publisher.convert import SCHEMA_VERSION
from stream_monitor.v1alpha1 import summary_pb2

REQUESTS = 64
CAPTURE = CaptureSettings()
PROMPT_TOKENS, SENTENCE_TOKENS = 960, 24
FLAGS = bytes([2] * (SENTENCE_TOKENS - 1) + [1])
"""Words, each after a space, and a full stop."""
INSTANCE = "00000000-0000-0000-0000-000000000000"
_FORCED = CAPTURE.sink_blocks + CAPTURE.recent_blocks
_RUNNING, _BEGUN = b"#RUNNING", b"##BEGUN#"
"""In request ids, in place of the cycle in which a request began: the one before, and this one."""
_STAMP = 3 * 11
"""Bytes at the end of a message: sequence, step and time. A field that comes again replaces the first (protobuf)."""


Drawn = dict[str, np.ndarray]
"""Arrays of all rows of one request, by their names in `Rows`."""


@dataclass(frozen=True)
class Shape:
    """What is captured of each row, and how long requests are.

    Attributes:
        layers, heads: watched, and query heads of each.
        tokens: output of each request.
    """

    layers: int
    heads: int
    tokens: int

    @property
    def rows(self) -> int:
        """Of one request."""
        return self.tokens // CAPTURE.stride

    def engine(self) -> summary_pb2.EngineInfo:
        """Its description."""
        return summary_pb2.EngineInfo(
            instance=INSTANCE,
            model_name="drawn",
            engine="0",
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            layers=range(self.layers),
            query_heads=range(self.heads),
            total_query_heads=self.heads,
            geometry=summary_pb2.BlockGeometry(
                block_size=CAPTURE.block_size,
                top_k=CAPTURE.top_k,
                sink_blocks=CAPTURE.sink_blocks,
                recent_blocks=CAPTURE.recent_blocks,
                strategy=CAPTURE.strategy,
            ),
        )


@dataclass(frozen=True)
class Message:
    """One summary, but for its numbers.

    Attributes:
        body: of the `StepSummary`, without sequence, step and time.
        rows: it carries.
    """

    body: bytes
    rows: int

    def stamped(self, cycle: int, sequence: int, step: int, now_ns: int) -> bytes:
        """The `PublishRequest`."""
        ids = self.body.replace(_RUNNING, b"%08x" % (cycle - 1)).replace(_BEGUN, b"%08x" % cycle)
        stamp = b"\x18" + _varint(sequence) + b"\x20" + _varint(step) + b"\x28" + _varint(now_ns)
        size = len(ids) + _STAMP
        return b"\x0a" + _varint(size, 4) + ids + stamp


def _varint(value: int, size: int = 10) -> bytes:
    """Always of as many bytes, which protobuf reads like the shortest form."""
    return bytes([value >> 7 * place & 0x7F | 0x80 for place in range(size - 1)]) + bytes([value >> 7 * (size - 1)])


class Traffic:
    """One cycle of a shape.

    Attributes:
        messages: of one cycle, one for each step with rows: all requests are sampled in the same steps.
        rows: of one cycle.
    """

    def __init__(self, shape: Shape, seed: int) -> None:
        assert shape.tokens % (REQUESTS * CAPTURE.stride) == 0, "whole rows between two requests' beginnings"
        self.shape = shape
        self._draw = np.random.default_rng(seed)
        self._engine = shape.engine()
        self._places = [self._request() for _ in range(REQUESTS)]
        self.messages = [self._message(step) for step in range(0, shape.tokens, CAPTURE.stride)]
        self.rows = sum(message.rows for message in self.messages)

    @property
    def row_bytes(self) -> float:
        """On the wire, with its part of all that goes along."""
        return sum(len(message.stamped(1, 1, 1, 1)) for message in self.messages) / self.rows

    def endless(self) -> Iterator[tuple[Message, int, int]]:
        """Messages, each with its cycle, from 1, and its sequence number."""
        sequence = cycle = 0
        while True:
            cycle += 1
            for message in self.messages:
                sequence += 1
                yield message, cycle, sequence

    def _message(self, step: int) -> Message:
        shape = self.shape
        started, ended, rows, runs = [], [], [], []
        for place in range(REQUESTS):
            token = step - place * (shape.tokens // REQUESTS)
            name = _name(place, _BEGUN if token >= 0 else _RUNNING)
            token %= shape.tokens
            if token == 0:
                started.append(_started(name))
                runs.append(_run(_name(place, _RUNNING), shape.tokens + 1 - CAPTURE.stride, shape.tokens))
                ended.append(
                    summary_pb2.RequestFinished(
                        request_id=_name(place, _RUNNING), total_tokens=PROMPT_TOKENS + shape.tokens
                    )
                )
            rows.append((name, token // CAPTURE.stride, self._places[place]))
            # Tokens wait for the row of their request (`RequestTable.take_tokens`).
            runs.append(_run(name, max(0, token + 1 - CAPTURE.stride), token + 1))
        summary = summary_pb2.StepSummary(
            schema_version=SCHEMA_VERSION,
            engine=self._engine,
            started=started,
            tokens=runs,
            rows=_packed(rows),
            finished=ended,
            ledger=_ledger(),
        )
        return Message(summary.SerializeToString(), len(rows))

    def _request(self) -> Drawn:
        """Attention of one request: in each half of its output on another part of the prompt, beside much else."""
        rows, lead = self.shape.rows, (self.shape.rows, self.shape.layers, self.shape.heads)
        token = CAPTURE.stride * np.arange(rows)
        positions = PROMPT_TOKENS - 1 + token
        inner = (positions // CAPTURE.block_size + 1 - _FORCED)[:, None, None, None]
        # Blocks differ within a head; the heads of a row agree on some.
        apart = self._draw.permuted(np.tile(np.arange(inner.min()), (rows, 1)), axis=1)[:, None, None, : CAPTURE.top_k]
        begin = self._draw.zipf(1.3, (*lead, 1)) % inner
        blocks = CAPTURE.sink_blocks + (begin + apart) % inner
        anchors = self._draw.choice(int(inner.min()), 2, replace=False)
        anchor = anchors[(2 * token >= self.shape.tokens).astype(int)][:, None, None]
        shares = self._draw.dirichlet(np.full(CAPTURE.top_k + _FORCED + 1, 0.5), lead)
        twice = blocks == CAPTURE.sink_blocks + anchor[..., None]
        blocks[..., 0] = CAPTURE.sink_blocks + anchor
        twice[..., 0] = False
        blocks = np.where(twice, NO_BLOCK, blocks)
        shares[..., : CAPTURE.top_k][twice] = 0
        weight = self._draw.uniform(0.2, 0.5, lead)
        shares *= ((1 - weight) / shares.sum(-1))[..., None]
        shares[..., 0] += weight
        with np.errstate(divide="ignore"):
            log = np.log(shares).astype("<f2")
        strongest = self._draw.integers(0, CAPTURE.block_size, (*lead, CAPTURE.top_k + _FORCED), np.uint8)
        strongest[..., 0] = 7
        # Of the row's own block no key may lie behind the row.
        strongest[..., -1] = (positions % CAPTURE.block_size)[:, None, None]
        phases = np.where(token == 0, summary_pb2.PHASE_PREFILL_END, summary_pb2.PHASE_DECODE)
        return {
            "positions": positions.astype("<u4"),
            "attempts": np.zeros(rows, "<u4"),
            "phases": phases.astype("u1"),
            "narrow_block_ids": blocks.astype("<u2"),
            "block_log_share": log[..., : CAPTURE.top_k],
            "block_strongest": strongest[..., : CAPTURE.top_k],
            "forced_log_share": log[..., CAPTURE.top_k : -1],
            "forced_strongest": strongest[..., CAPTURE.top_k :],
            "unobserved_log_share": log[..., -1],
            "total_lse": np.zeros(lead, "<f4"),
            "keys_read": np.zeros(lead[:2], "<f4"),
        }


def _name(place: int, begun: bytes) -> str:
    return f"chatcmpl-{place:04x}{begun.decode()}-aee6d49e"


def _started(name: str) -> summary_pb2.RequestStarted:
    """A prompt of sentences: a fourth of them the system's, the rest the user's."""
    return summary_pb2.RequestStarted(
        request_id=name,
        prompt_tokens=PROMPT_TOKENS,
        role_starts=np.array([0, PROMPT_TOKENS // 4], "<u4").tobytes(),
        roles=bytes([summary_pb2.ROLE_SYSTEM, summary_pb2.ROLE_USER]),
        prompt_flags=FLAGS * (PROMPT_TOKENS // SENTENCE_TOKENS),
    )


def _run(name: str, first: int, end: int) -> summary_pb2.TokenRun:
    """Tokens of the output."""
    flags = (FLAGS * (end // SENTENCE_TOKENS + 1))[first:end]
    return summary_pb2.TokenRun(request_id=name, first_position=PROMPT_TOKENS + first, flags=flags)


def _packed(rows: list[tuple[str, int, Drawn]]) -> summary_pb2.Rows:
    """Rows of several requests, each with the number it has in its own."""
    fields = {name: b"".join(drawn[name][number].tobytes() for _, number, drawn in rows) for name in rows[0][2]}
    return summary_pb2.Rows(count=len(rows), request_ids=[name for name, _, _ in rows], **fields)


def _ledger() -> summary_pb2.Ledger:
    """As of an engine at work; its counts do not grow."""
    counts = {"expected": 1 << 20, "captured": 1 << 18, "sampled_out": 3 << 18, "raced": 0}
    return summary_pb2.Ledger(
        token_rows=[summary_pb2.RowCount(outcome=outcome, count=count) for outcome, count in counts.items()],
        chunk_rows=[summary_pb2.RowCount(outcome=outcome) for outcome in counts],
        estimates=1 << 18,
        estimate_seconds=1e3,
        hook_seconds=1.0,
        key_bytes=1 << 32,
        record_bytes=1 << 32,
        sent=1 << 18,
        queues=[summary_pb2.QueueState(name=name, size=1, capacity=4) for name in ("estimator", "ring", "backlog")],
        stride=CAPTURE.stride,
    )
