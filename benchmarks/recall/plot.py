"""Recall against keys read, one panel for each model and length."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.recall.frontier import interpolated
from benchmarks.recall.points import BEAM, DEFAULT, Case

_COLOURS = {"beam": "black", "descent": "tab:red", "min/max": "tab:blue", "mean": "tab:green"}
_MARKS = {"r=1": "o", "r=4": "s", "r=32": "D"}


def plot(cases: Sequence[Case], top_k: int, path: Path) -> None:
    """Inner recall over the oracle's, averaged over the texts of each panel.

    Lines are frontiers of a method's settings; markers are methods that have one setting, and the default of `beam`.
    """
    panels = list(dict.fromkeys((case.model, case.tokens) for case in cases))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 5.4), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        own = [case for case in cases if (case.model, case.tokens) == panel]
        for method in own[0].methods():
            _draw(axis, own, method, top_k)
        axis.axhline(100, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlim(0.004, 1.0)
        axis.set_ylim(0, 103)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
        axis.grid(alpha=0.25)
        axis.set_title(
            f"{panel[0]}, {panel[1]:,} tokens, {own[0].group} query heads a KV head\n"
            f"mean over {', '.join(case.text for case in own)}",
            fontsize=10,
        )
        axis.set_xlabel("key-equivalents read per query head, of dense attention's")
    axes[0][0].set_ylabel(f"attention kept on {top_k} inner blocks, % of the oracle's")
    axes[0][0].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"Inner recall against keys read, K = {top_k}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axis: Axes, cases: Sequence[Case], method: str, top_k: int) -> None:
    family = next(name for name in _COLOURS if method.startswith(name))
    colour = _COLOURS[family]
    curves = [case.curve(method, top_k) for case in cases]
    if len(curves[0]) == 1:
        mark = next((mark for name, mark in _MARKS.items() if name in method), "^")
        reads, recall = np.mean([curve[0] for curve in curves], axis=0)
        axis.plot(reads, 100 * recall, mark, color=colour, markerfacecolor="none", label=method)
        return
    first = max(min(reads for reads, _ in curve) for curve in curves)
    last = max(max(reads for reads, _ in curve) for curve in curves)
    grid = np.geomspace(first, last, 200)
    line = [np.mean([100 * (interpolated(curve, reads) or 0.0) for curve in curves]) for reads in grid]
    style = "--" if "r=4" in method else "-"
    axis.plot(grid, line, style, color=colour, linewidth=2.2 if method == BEAM else 1.3, label=method)
    if method == BEAM:
        defaults = [p for case in cases for p in case.points if (p.setting, p.top_k) == (DEFAULT, top_k)]
        reads = np.mean([point.reads for point in defaults])
        axis.plot(reads, 100 * np.mean([p.figures.inner for p in defaults]), "k*", markersize=13, label="beam, default")
