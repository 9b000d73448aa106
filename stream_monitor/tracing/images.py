"""The report's pictures as PNG files, for a paper or a chat."""

from pathlib import Path
from typing import Any

import numpy as np

from stream_monitor.tracing.findings import Cells, Findings, mask_cells, receiver_matrix

MASKS, SENTENCES, ANCHORS, ROUTES = "masks.png", "sentences.png", "anchors.png", "routes.png"
_SHOWN_HEADS = 6
_SHOWN_EDGES = 60
_LABELLED = 5
"""Highest sentences whose text is written into the curve."""
_LABEL_CHARACTERS = 90
_FAINTEST = 1e-3
"""Share at which a colour scale begins."""


def write_images(findings: Findings, folder: Path) -> None:
    """Writes the PNG files of a trace into `folder`; the one of routes only if a needle was named."""
    pictures = {MASKS: _masks(findings), SENTENCES: _sentences(findings), ANCHORS: _anchors(findings)}
    if findings.routes is not None:
        pictures[ROUTES] = _routes(findings)
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=150)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _masks(findings: Findings) -> Any:
    """Masks of the most peaked receiver heads."""
    from matplotlib.colors import LogNorm

    heads = findings.anchors.receivers[:_SHOWN_HEADS] or ((0, 0),)
    figure = _figure(10, 7)
    axes = figure.subplots(-(-len(heads) // 3), min(3, len(heads)), squeeze=False).ravel()
    image = None
    for axis, (layer, head) in zip(axes, heads, strict=False):
        cells = mask_cells(findings.masks.layer(layer), head)
        end = cells.side * cells.pool * findings.block_size
        image = axis.imshow(
            _grid(cells), cmap="viridis", norm=LogNorm(_FAINTEST, 1), extent=(0, end, end, 0), interpolation="none"
        )
        axis.set_title(f"layer {layer}, head {head}", fontsize=10)
        axis.set_xlabel("keys, token")
        axis.set_ylabel("queries, token")
        axis.tick_params(labelsize=8)
    for axis in axes[len(heads) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=list(axes), label=f"share of a query block's attention, {_reduction(findings)}")
    figure.suptitle("Key blocks that the most peaked receiver heads read; what is white was not kept")
    return figure


def _grid(cells: Cells) -> Any:
    grid = np.full((cells.side, cells.side), np.nan)
    grid[cells.row, cells.column] = np.maximum(cells.share, _FAINTEST)
    return grid


def _reduction(findings: Findings) -> str:
    rows = findings.block_size
    return f"{'mean' if findings.masks.metadata['reduction'] == 'mean' else 'largest'} over its {rows} rows"


def _sentences(findings: Findings) -> Any:
    from matplotlib.colors import LogNorm

    matrix, pool = receiver_matrix(findings)
    figure = _figure(7.5, 6.5)
    axis = figure.subplots()
    end = len(matrix) * pool
    image = axis.imshow(
        np.where(matrix > 0, np.maximum(matrix, _FAINTEST), np.nan),
        cmap="viridis",
        norm=LogNorm(_FAINTEST, 1),
        extent=(0, end, end, 0),
        interpolation="none",
    )
    axis.set_xlabel("sentence that is read")
    axis.set_ylabel("sentence that reads")
    axis.set_title("What sentences read, mean over the receiver heads", fontsize=11)
    figure.colorbar(image, label="share of the sentence's attention")
    return figure


def _anchors(findings: Findings) -> Any:
    figure = _figure(10, 4.8)
    axis = figure.subplots()
    scores = findings.anchors.scores
    colours = {"prompt": "tab:gray", "reasoning": "tab:blue", "answer": "tab:green"}
    roles = np.array([sentence.role for sentence in findings.sentences])
    for role, colour in colours.items():
        some = np.flatnonzero(roles == role)
        if len(some):
            axis.plot(some, np.where(scores[some] > 0, scores[some], np.nan), ".-", lw=0.6, color=colour, label=role)
    axis.set_yscale("log")
    highest = findings.anchors.ranking()[:_LABELLED].tolist()
    for rank, sentence in enumerate(highest, 1):
        axis.annotate(str(rank), (sentence, scores[sentence]), ha="center", va="bottom", fontsize=9)
    for label in _labels([findings.sentences[sentence].text for sentence in highest], highest):
        axis.plot([], [], " ", label=label)
    axis.set_xlabel("sentence")
    axis.set_ylabel("anchor score (attention per pair of tokens)")
    axis.set_title("Thought anchors: sentences that later ones look back to", fontsize=11)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, frameon=False)
    return figure


def _labels(texts: list[str], sentences: list[int]) -> list[str]:
    """Ranks, numbers and texts of the highest sentences; those that say the same share a label."""
    by_text: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        by_text.setdefault(" ".join(text.split()), []).append(place)
    labels = []
    for text, places in by_text.items():
        ranks = ", ".join(str(place + 1) for place in places)
        numbers = ", ".join(str(sentences[place]) for place in places)
        short = text if len(text) <= _LABEL_CHARACTERS else f"{text[:_LABEL_CHARACTERS].rstrip()}…"
        # A `$` would begin a formula.
        labels.append(f"{ranks}. sentence{'s' * (len(places) > 1)} {numbers}: {short}".replace("$", r"\$"))
    return labels


def _routes(findings: Findings) -> Any:
    routes = findings.routes
    assert routes is not None
    figure = _figure(10, 6)
    axis = figure.subplots()
    hops = routes.strongest_edges(_SHOWN_EDGES)
    strongest = max((hop.through for hop in hops), default=1.0)
    for hop in reversed(hops):
        axis.plot(
            [hop.key_block, hop.query_block],
            [hop.layer, hop.layer + 1],
            color="tab:blue",
            alpha=max(0.08, hop.through / strongest),
            linewidth=1,
        )
    blocks, layers = routes.corners()
    axis.plot(blocks, layers, color="tab:red", linewidth=2, label=f"strongest route, {routes.strength:.3g}")
    axis.set_xlim(-1, routes.blocks)
    axis.set_xlabel(f"block of {findings.block_size} tokens")
    axis.set_ylabel("layer")
    axis.set_title(f"Routes from the needle (block {routes.sources[0]}) to the answer (block {routes.target})")
    axis.legend(loc="upper left")
    return figure
