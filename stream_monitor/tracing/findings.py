"""What a report shows of a trace, as arrays small enough to draw."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_kernels.search import NO_BLOCK
from stream_monitor.tracing.comparison import Comparison
from stream_monitor.tracing.masks import LayerMasks, MaskFile
from stream_monitor.tracing.routes import Routes
from stream_monitor.tracing.sentence_file import SentenceFile
from stream_monitor.tracing.sentences import Sentence
from stream_monitor.tracing.thought_anchors import Anchors

MOST_CELLS = 512
"""Cells along a side of a picture of masks; larger masks are pooled."""
MOST_SENTENCES = 300
"""The same of the sentence heat map."""


@dataclass(frozen=True)
class Findings:
    """A finished trace.

    Attributes:
        summary: of `trace.json`.
        masks, mass: its files.
        sentences: of the context.
        anchors: its anchor curve.
        routes: from the needle, None if none was named.
        needle: its text.
        comparison: of the routes with those of another trace, if one was named.
    """

    summary: dict[str, Any]
    masks: MaskFile
    mass: SentenceFile
    sentences: Sequence[Sentence]
    anchors: Anchors
    routes: Routes | None
    needle: str | None
    comparison: Comparison | None

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return int(self.masks.metadata["search"]["block_size"])

    def anchors_json(self) -> dict[str, Any]:
        """JSON values for `anchors.json`; a score is a mean share per pair of tokens, `mass` of the whole sentence."""
        scores = [float(score) if np.isfinite(score) else None for score in self.anchors.scores]
        places = {int(sentence): rank for rank, sentence in enumerate(self.anchors.ranking(), 1)}
        return {
            "reduction": self.masks.metadata["reduction"],
            "receiver_heads": [
                {"layer": layer, "head": head, "excess_kurtosis": float(self.anchors.kurtosis[layer, head])}
                for layer, head in self.anchors.receivers
            ],
            "unobserved": float(np.mean([layer.unobserved.mean() for layer in self.mass])),
            "sentences": [
                vars(sentence)
                | {
                    "score": score,
                    "mass": None if score is None else score * (sentence.end - sentence.start),
                    "rank": places.get(number),
                }
                for number, (sentence, score) in enumerate(zip(self.sentences, scores, strict=True))
            ],
        }


@dataclass(frozen=True)
class Cells:
    """The filled cells of a picture of one head's mask.

    Attributes:
        row, column: int64 [n], of query and key blocks, `pool` blocks each.
        share: float32 [n], the largest in the cell.
        side: cells along a side.
        pool: blocks along a side of a cell.
    """

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    share: NDArray[np.float32]
    side: int
    pool: int


def mask_cells(layer: LayerMasks, head: int) -> Cells:
    """Kept and forced blocks of one head."""
    blocks = len(layer.rows)
    pool = -(-blocks // MOST_CELLS)
    side = -(-blocks // pool)
    ids = np.concatenate([layer.block_ids[:, head], layer.forced_ids], axis=1).astype(np.int64)
    shares = np.concatenate([layer.block_shares[:, head], layer.forced_shares[:, head]], axis=1)
    kept = ids != NO_BLOCK
    row = np.broadcast_to(np.arange(blocks)[:, None], ids.shape)[kept] // pool
    codes, inverse = np.unique(row * side + ids[kept] // pool, return_inverse=True)
    largest = np.zeros(len(codes), np.float32)
    np.maximum.at(largest, inverse, shares[kept])
    return Cells(codes // side, codes % side, largest, side, pool)


def receiver_matrix(findings: Findings) -> tuple[NDArray[np.float64], int]:
    """Mean over the receiver heads of each sentence's mass on each: float64 [n, n], and sentences per row and column.

    Larger matrices are pooled: mean over query sentences, sum over key sentences. NaN above the diagonal.
    """
    count = len(findings.sentences)
    pool = -(-count // MOST_SENTENCES)
    side = -(-count // pool)
    total = np.zeros(side * side)
    for number in sorted({layer for layer, _ in findings.anchors.receivers}):
        layer = findings.mass.layer(number)
        heads = [head for one, head in findings.anchors.receivers if one == number]
        some = np.isin(layer.head, heads)
        codes = layer.query[some].astype(np.int64) // pool * side + layer.key[some] // pool
        total += np.bincount(codes, layer.mass[some], side * side)
    rows = np.bincount(np.arange(count) // pool)
    matrix = total.reshape(side, side) / rows[:, None] / max(1, len(findings.anchors.receivers))
    return np.where(np.tri(side, dtype=bool), matrix, np.nan), pool
