"""What is written beside the masks of a trace, in the same pass: sentence masses, anchors, routes, and the report."""

import json
from pathlib import Path
from typing import Any

from stream_kernels.prefill import PrefillSummary
from stream_monitor.tracing.attention import LayerInputs
from stream_monitor.tracing.comparison import OtherTrace
from stream_monitor.tracing.findings import Findings
from stream_monitor.tracing.images import write_images
from stream_monitor.tracing.masks import MaskFile
from stream_monitor.tracing.model import TracedModel
from stream_monitor.tracing.report import report_html
from stream_monitor.tracing.routes import ROUTES, find_routes
from stream_monitor.tracing.sentence_file import SentenceFile, SentenceWriter
from stream_monitor.tracing.sentence_mass import read_sentence_mass
from stream_monitor.tracing.sentences import (
    anchor_candidates,
    find_tokens,
    sentence_of_tokens,
    split_sentences,
    token_counts,
    token_texts,
)
from stream_monitor.tracing.thought_anchors import Scores, find_anchors, vertical_scores

SENTENCES = "sentences.parquet"
ANCHORS = "anchors.json"
REPORT = "report.html"


class ReportWriter:
    """A companion of a trace, see `trace.Companion`.

    Args:
        model: loaded.
        ids: the context.
        block_size: tokens per block of the trace.
        needle: a text in the context whose routes to the answer are sought; None for no routes.
        against: the folder of another trace, whose routes these are compared with.

    Attributes:
        sentences: of the context.

    Raises:
        TracingError: the context does not contain the needle, or the other trace does not fit.
    """

    def __init__(
        self,
        model: TracedModel,
        ids: list[int],
        block_size: int,
        needle: str | None = None,
        against: Path | None = None,
    ) -> None:
        texts = token_texts(model.tokenizer, ids)
        self.sentences = split_sentences(texts)
        self._sentence_of = sentence_of_tokens(self.sentences)
        self._counts = token_counts(self.sentences)
        self._block_size = block_size
        self._needle = needle
        self._needle_tokens = None if needle is None else find_tokens(texts, needle)
        self._other = None if against is None else OtherTrace.open(against, model.layers, len(ids), block_size)
        self._vertical: list[Scores] = []
        self._writer: SentenceWriter | None = None

    def begin(self, folder: Path) -> None:
        """Opens the file of sentence masses."""
        self._writer = SentenceWriter(folder / SENTENCES)

    def read(self, inputs: LayerInputs, found: PrefillSummary) -> None:
        """Takes in the next layer."""
        assert self._writer is not None, "not begun"
        mass = read_sentence_mass(inputs, found, self._block_size, self._sentence_of)
        self._writer.write(mass)
        self._vertical.append(vertical_scores(mass, self._counts))

    def finish(self, folder: Path, masks: Path, summary: dict[str, Any]) -> None:
        """Writes all else, given the finished file of masks and what `trace.json` says."""
        assert self._writer is not None, "not begun"
        self._writer.close()
        stored = MaskFile(masks)
        routes = None if self._needle_tokens is None else find_routes(stored, self._block_size, self._needle_tokens)
        comparison = None if routes is None or self._other is None else self._other.compare(routes)
        findings = Findings(
            summary=summary,
            masks=stored,
            mass=SentenceFile(folder / SENTENCES),
            sentences=self.sentences,
            anchors=find_anchors(self._vertical, anchor_candidates(self.sentences)),
            routes=routes,
            needle=self._needle,
            comparison=comparison,
        )
        _write_json(folder / ANCHORS, findings.anchors_json())
        if routes is not None:
            compared = {} if comparison is None else {"against": comparison.summary()}
            _write_json(folder / ROUTES, {"needle": self._needle} | routes.summary() | compared)
        (folder / REPORT).write_text(report_html(findings), encoding="utf-8")
        write_images(findings, folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
