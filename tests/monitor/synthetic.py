"""Summaries as an engine would send them, made by hand: each row puts a known share on a known token position."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stream_monitor.anchors.matrix import NO_BLOCK, forced_block_ids
from stream_monitor.v1alpha1 import summary_pb2

BLOCK, TOP_K, SINK, RECENT = 8, 4, 1, 2
WORD, FULL_STOP = 2, 1
SENTENCE = bytes([WORD] * 5 + [FULL_STOP])
"""Flags of a sentence of six tokens: five words, each after a space, and a full stop."""


def geometry() -> summary_pb2.BlockGeometry:
    return summary_pb2.BlockGeometry(
        block_size=BLOCK, top_k=TOP_K, sink_blocks=SINK, recent_blocks=RECENT, strategy="exact"
    )


def engine(
    instance: str = "", layers: Sequence[int] = (3, 5), heads: Sequence[int] = (0, 1), **more: object
) -> summary_pb2.EngineInfo:
    fields: dict[str, object] = {
        "instance": instance or str(uuid.uuid4()),
        "model_name": "tiny",
        "engine": "0",
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "layers": layers,
        "query_heads": heads,
        "total_query_heads": 8,
        "geometry": geometry(),
    }
    return summary_pb2.EngineInfo(**(fields | more))  # type: ignore[arg-type]


@dataclass
class Look:
    """One row: `share` of its attention on key `target`, `unobserved` nowhere, `sink` on a learned sink, the rest on
    itself.

    `by_head` gives every (layer, head) of `engine()` a target of its own, [layers, heads].
    """

    request_id: str
    position: int
    target: int = 0
    share: float = 0.5
    unobserved: float = 0.1
    sink: float = 0.0
    attempt: int = 0
    phase: int = summary_pb2.PHASE_DECODE
    by_head: np.ndarray | None = None


def rows(looks: Sequence[Look], info: summary_pb2.EngineInfo) -> summary_pb2.Rows:
    lead = (len(looks), len(info.layers), len(info.query_heads))
    ids = np.full((*lead, TOP_K), NO_BLOCK, "<u4")
    kept = np.zeros((*lead, TOP_K))
    strongest = np.zeros((*lead, TOP_K), np.uint8)
    forced = np.zeros((*lead, SINK + RECENT))
    forced_strongest = np.zeros((*lead, SINK + RECENT), np.uint8)
    unobserved = np.zeros(lead)
    positions = np.array([look.position for look in looks], np.int64)
    forced_ids = forced_block_ids(positions, BLOCK, SINK, RECENT)
    for r, look in enumerate(looks):
        own = int(np.flatnonzero(forced_ids[r] == look.position // BLOCK)[0])
        for layer in range(lead[1]):
            for head in range(lead[2]):
                target = look.target if look.by_head is None else int(look.by_head[layer, head])
                place = (r, layer, head)
                slots = np.flatnonzero(forced_ids[r] == target // BLOCK)
                same = len(slots) and slots[0] == own
                if len(slots):
                    forced[(*place, slots[0])] = look.share
                    forced_strongest[(*place, slots[0])] = target % BLOCK
                else:
                    ids[(*place, 0)], kept[(*place, 0)] = target // BLOCK, look.share
                    strongest[(*place, 0)] = target % BLOCK
                forced[(*place, own)] += 1 - look.share - look.unobserved - look.sink
                if not same:
                    forced_strongest[(*place, own)] = look.position % BLOCK
                unobserved[place] = look.unobserved
    sinks = np.broadcast_to(np.array([look.sink for look in looks])[:, None, None], lead)
    with np.errstate(divide="ignore"):
        return summary_pb2.Rows(
            count=len(looks),
            request_ids=[look.request_id for look in looks],
            positions=positions.astype("<u4").tobytes(),
            attempts=np.array([look.attempt for look in looks], "<u4").tobytes(),
            phases=np.array([look.phase for look in looks], "u1").tobytes(),
            narrow_block_ids=ids.astype("<u2").tobytes(),
            block_log_share=np.log(kept).astype("<f2").tobytes(),
            block_strongest=strongest.tobytes(),
            forced_log_share=np.log(forced).astype("<f2").tobytes(),
            forced_strongest=forced_strongest.tobytes(),
            unobserved_log_share=np.log(unobserved).astype("<f2").tobytes(),
            total_lse=np.zeros(lead, "<f4").tobytes(),
            keys_read=np.zeros(lead[:2], "<f4").tobytes(),
            learned_sink_log_share=np.log(sinks).astype("<f2").tobytes() if sinks.any() else b"",
        )


def started(request_id: str, prompt_tokens: int = 48, refused: str = "") -> summary_pb2.RequestStarted:
    """A prompt of sentences of six tokens: the first half of them the system's, the rest the user's."""
    half = prompt_tokens // 12 * 6
    flags = (SENTENCE * (prompt_tokens // 6 + 1))[:prompt_tokens]
    return summary_pb2.RequestStarted(
        request_id=request_id,
        prompt_tokens=prompt_tokens,
        role_starts=np.array([0, half], "<u4").tobytes(),
        roles=bytes([summary_pb2.ROLE_SYSTEM, summary_pb2.ROLE_USER]),
        prompt_flags=flags,
        refused_reason=refused,
    )


def tokens(request_id: str, first: int, flags: bytes = SENTENCE, ids: Sequence[int] = ()) -> summary_pb2.TokenRun:
    packed = np.array(ids, "<u4").tobytes()
    return summary_pb2.TokenRun(request_id=request_id, first_position=first, flags=flags, token_ids=packed)


def finished(request_id: str, total: int) -> summary_pb2.RequestFinished:
    return summary_pb2.RequestFinished(request_id=request_id, total_tokens=total)


@dataclass
class Engine:
    """One rank: numbers its summaries and keeps the ledger that the publisher would send."""

    info: summary_pb2.EngineInfo = field(default_factory=engine)
    sequence: int = 0
    step: int = 0
    captured: int = 0

    @property
    def heads(self) -> int:
        return len(self.info.layers) * len(self.info.query_heads)

    def ledger(self) -> summary_pb2.Ledger:
        return summary_pb2.Ledger(
            token_rows=[
                summary_pb2.RowCount(outcome="expected", count=4 * self.captured + 7),
                summary_pb2.RowCount(outcome="captured", count=self.captured),
                summary_pb2.RowCount(outcome="sampled_out", count=3 * self.captured),
                summary_pb2.RowCount(outcome="dropped", reason="ring_full", count=7),
            ],
            refused_arguments={"other:unknown": 1},
            estimates=self.step,
            estimate_seconds=0.5 * self.step,
        )

    def summary(self, looks: Sequence[Look] = (), **more: object) -> summary_pb2.StepSummary:
        self.sequence += 1
        self.captured += len(looks) * self.heads
        if looks:
            self.step += 1
        fields: dict[str, object] = {
            "schema_version": 2,
            "engine": self.info,
            "sequence": self.sequence,
            "step": self.step if looks else 0,
            "ledger": self.ledger(),
        }
        if looks:
            fields["rows"] = rows(looks, self.info)
        return summary_pb2.StepSummary(**(fields | more))  # type: ignore[arg-type]

    def request(self, request_id: str, targets: Sequence[int], prompt: int = 48) -> list[summary_pb2.StepSummary]:
        """A whole request: one sentence of six tokens for each target, with three rows that look at it."""
        summaries = [self.summary(started=[started(request_id, prompt)])]
        position = prompt
        for target in targets:
            summaries.append(self.summary(tokens=[tokens(request_id, position)]))
            summaries += [self.summary([Look(request_id, position + offset, target)]) for offset in (0, 2, 4)]
            position += len(SENTENCE)
        return [*summaries, self.summary(finished=[finished(request_id, position)])]
