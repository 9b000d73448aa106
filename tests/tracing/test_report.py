"""The report of a trace: whole, self-contained, and safe whatever the context says."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream_kernels.search import NO_BLOCK, SearchConfig
from stream_monitor.tracing import findings, images
from stream_monitor.tracing.attention import dense_attention
from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.findings import mask_cells, receiver_matrix
from stream_monitor.tracing.layer import TraceOptions
from stream_monitor.tracing.masks import MaskFile
from stream_monitor.tracing.model import TracedModel
from stream_monitor.tracing.report_writer import ReportWriter
from stream_monitor.tracing.sentence_file import SentenceFile
from stream_monitor.tracing.sentences import anchor_candidates, sentence_of_tokens
from stream_monitor.tracing.thought_anchors import agreement, exact_vertical_scores, find_anchors
from stream_monitor.tracing.trace import trace

EVIL = '</script><script>alert(1)</script><b>bold & "quoted"</b> $model ${model}'
TEXT = f"The code is 4711. Keep it. {EVIL}. " + "".join(f"Then comes line {number}. " for number in range(12)) + "And?"


@pytest.fixture(scope="module")
def traced(tiny_model: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trace that keeps everything, with a needle."""
    ids = tiny_model.prompt_tokens(TEXT)
    options = TraceOptions(SearchConfig(strategy="exact", block_size=8, top_k=64), "dense", "mean")
    out = tmp_path_factory.mktemp("traced") / "out"
    return trace(tiny_model, ids, options, out, companion=ReportWriter(tiny_model, ids, 8, EVIL)).out


@pytest.fixture(scope="module")
def page(traced: Path) -> str:
    return (traced / "report.html").read_text()


def data_of(page: str) -> dict[str, Any]:
    """What the page draws."""
    found = re.search(r"^const trace = (.*);$", page, re.MULTILINE)
    assert found is not None
    return dict(json.loads(found.group(1)))


def test_all_files_are_there(traced: Path) -> None:
    assert {path.name for path in traced.iterdir()} == {
        "masks.parquet",
        "trace.json",
        "sentences.parquet",
        "anchors.json",
        "routes.json",
        "report.html",
        *("masks.png", "sentences.png", "anchors.png", "routes.png"),
    }
    for picture in traced.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_sentences_that_say_the_same_share_a_label() -> None:
    labels = images._labels(["So it is 5 $.\n", "long " * 40, " So  it is 5 $."], [7, 3, 40])
    assert labels[0] == r"1, 3. sentences 7, 40: So it is 5 \$."
    assert re.fullmatch("2. sentence 3: (long )+long…", labels[1])
    assert len(labels) == 2


def test_anchors_of_a_mask_that_keeps_everything_are_those_of_exact_attention(
    traced: Path, tiny_model: TracedModel
) -> None:
    stored = json.loads((traced / "anchors.json").read_text())
    sentences = stored["sentences"]
    assert "".join(sentence["text"] for sentence in sentences) == TEXT
    writer = ReportWriter(tiny_model, tiny_model.prompt_tokens(TEXT), 8)
    exact: list[Any] = []

    def attend(inputs: Any) -> Any:
        exact.append(exact_vertical_scores(inputs, sentence_of_tokens(writer.sentences)))
        return dense_attention(inputs)

    tiny_model.run(tiny_model.prompt_tokens(TEXT), attend)
    anchors = find_anchors(exact, anchor_candidates(writer.sentences))
    assert [(head["layer"], head["head"]) for head in stored["receiver_heads"]] == list(anchors.receivers)
    scores = np.array([sentence["score"] for sentence in sentences], float)
    np.testing.assert_allclose(scores, anchors.scores, rtol=1e-3)
    ranked = sorted((one["rank"], number) for number, one in enumerate(sentences) if one["rank"] is not None)
    assert [number for _, number in ranked] == anchors.ranking().tolist()
    assert sentences[3]["mass"] == pytest.approx(scores[3] * (sentences[3]["end"] - sentences[3]["start"]))
    assert agreement(anchors, anchors, np.ones(len(scores), np.int64)).spearman == pytest.approx(1)


def test_the_page_needs_nothing_else(page: str) -> None:
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", page)
    assert "Plotly" in page


def test_text_from_outside_is_escaped(page: str) -> None:
    assert page.count("</script") == page.count("<script") == 2
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    assert any(EVIL in sentence["text"] for sentence in data_of(page)["sentences"])


def test_the_page_holds_every_mask(page: str, traced: Path) -> None:
    masks = data_of(page)["masks"]
    count = sum(masks["counts"])
    planes = zlib.decompress(base64.b64decode(masks["entries"]))
    rows, columns = np.frombuffer(planes, "<u2", 2 * count).reshape(2, -1)
    roots = np.frombuffer(planes, "u1", offset=4 * count)
    assert (masks["layers"], masks["heads"], masks["step"]) == (3, 4, 8)
    assert len(masks["counts"]) == 12
    assert len(roots) == count
    first = sum(masks["counts"][:6])
    some = slice(first, first + masks["counts"][6])
    layer = MaskFile(traced / "masks.parquet").layer(1)
    expected = np.zeros((masks["side"], masks["side"]))
    for ids, shares in (
        (layer.block_ids[:, 2], layer.block_shares[:, 2]),
        (layer.forced_ids, layer.forced_shares[:, 2]),
    ):
        for block, place in np.ndindex(ids.shape):
            if ids[block, place] != NO_BLOCK:
                expected[block, ids[block, place]] = shares[block, place]
    found = np.zeros_like(expected)
    found[rows[some], columns[some]] = (roots[some] / 255) ** 2
    np.testing.assert_allclose(found, expected, atol=0.005)


def test_long_contexts_are_pooled(traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MaskFile(traced / "masks.parquet").layer(1)
    whole = mask_cells(layer, 0)
    monkeypatch.setattr(findings, "MOST_CELLS", 20)
    pooled = mask_cells(layer, 0)
    assert pooled.side <= 20
    grid = np.zeros((pooled.side * pooled.pool,) * 2)
    grid[whole.row, whole.column] = whole.share
    expected = grid.reshape(pooled.side, pooled.pool, pooled.side, pooled.pool).max((1, 3))
    np.testing.assert_array_equal(pooled.share, expected[pooled.row, pooled.column])


def test_routes_are_compared_with_another_traces(traced: Path, tiny_model: TracedModel, tmp_path: Path) -> None:
    ids = tiny_model.prompt_tokens(TEXT.replace("4711", "4712"))
    options = TraceOptions(SearchConfig(strategy="exact", block_size=8, top_k=64), "dense", "mean")
    out = trace(
        tiny_model, ids, options, tmp_path / "out", companion=ReportWriter(tiny_model, ids, 8, EVIL, traced)
    ).out
    mine, theirs = (json.loads((folder / "routes.json").read_text()) for folder in (out, traced))
    assert mine["against"]["strength"] == pytest.approx(theirs["strength"])
    assert mine["against"]["trace"] == str(traced)
    edges = mine["against"]["edges"]
    assert 0 < len(edges) <= 100
    assert edges[0]["difference"] != 0
    known = {(edge["layer"], edge["query_block"], edge["key_block"]): edge["through"] for edge in theirs["edges"]}
    for edge in edges:
        place = (edge["layer"], edge["query_block"], edge["key_block"])
        if place in known:
            assert edge["through"] - edge["difference"] == pytest.approx(known[place])
    assert "Beside another trace" in (out / "report.html").read_text()
    assert "Beside another trace" not in (traced / "report.html").read_text()
    with pytest.raises(TracingError, match=r"has 3 layers and \d+ blocks of 8 tokens; its routes cannot be compared"):
        ReportWriter(tiny_model, ids[:40], 8, None, traced)
    with pytest.raises(TracingError, match="is not a trace made with --needle"):
        ReportWriter(tiny_model, ids, 8, None, tmp_path)


def test_an_absent_needle_is_refused(tiny_model: TracedModel) -> None:
    with pytest.raises(TracingError, match="the context does not contain '4712'"):
        ReportWriter(tiny_model, tiny_model.prompt_tokens(TEXT), 8, "4712")


def test_a_failing_report_leaves_nothing(
    tiny_model: TracedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stream_monitor.tracing.report_writer.write_images", full)
    ids = tiny_model.prompt_tokens(TEXT)
    options = TraceOptions(SearchConfig(block_size=8))
    with pytest.raises(TracingError, match="No space left"):
        trace(tiny_model, ids, options, tmp_path / "out", companion=ReportWriter(tiny_model, ids, 8))
    assert list(tmp_path.iterdir()) == []


def test_the_heat_map_is_the_receivers_mean(
    traced: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TracedModel
) -> None:
    stored = json.loads((traced / "anchors.json").read_text())
    heads = [(head["layer"], head["head"]) for head in stored["receiver_heads"]]
    mass = SentenceFile(traced / "sentences.parquet")
    count = len(stored["sentences"])
    expected = np.zeros((count, count))
    for layer, head in heads:
        one = mass.layer(layer)
        some = one.head == head
        expected[one.query[some], one.key[some]] += one.mass[some] / len(heads)
    scores = np.array([sentence["score"] for sentence in stored["sentences"]], float)
    anchors = findings.Anchors(np.zeros((3, 4)), tuple(heads), scores, np.ones(count, bool))
    writer = ReportWriter(tiny_model, tiny_model.prompt_tokens(TEXT), 8)
    masks = MaskFile(traced / "masks.parquet")
    shown = findings.Findings({}, masks, mass, writer.sentences, anchors, None, None, None)
    matrix, pool = receiver_matrix(shown)
    assert pool == 1
    np.testing.assert_allclose(np.nan_to_num(matrix), expected, atol=1e-6)
    assert np.isnan(matrix[0, 1])
    monkeypatch.setattr(findings, "MOST_SENTENCES", 8)
    matrix, pool = receiver_matrix(shown)
    assert len(matrix) <= 8
    np.testing.assert_allclose(np.nansum(matrix[0]), expected[:pool].sum(1).mean(), rtol=1e-5)
