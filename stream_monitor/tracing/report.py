"""The report of a trace: one HTML file that needs nothing else, neither a server nor a network.

`report.html` and `report.js` beside this file are its page and its drawing; what they draw is put in here, every text
from outside escaped.
"""

import base64
import json
import zlib
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from stream_monitor.anchors.matrix import ANCHOR_GAP
from stream_monitor.tracing.findings import Findings, mask_cells, receiver_matrix

_TOP = 10
"""Anchors listed with their text."""
_EDGES = 150
"""Edges drawn of the routes."""
_LONGEST_TEXT = 600
"""Characters of a sentence that the page holds."""


def report_html(findings: Findings) -> str:
    """The page."""
    from plotly.offline import get_plotlyjs

    files = resources.files("stream_monitor.tracing")
    matrix, group = receiver_matrix(findings)
    masks = _masks(findings)
    data = {
        "masks": masks,
        "matrix": [[None if np.isnan(share) else float(f"{share:.3g}") for share in row] for row in matrix],
        "group": group,
        "sentences": [{"role": one.role, "text": one.text[:_LONGEST_TEXT]} for one in findings.sentences],
        "scores": [None if np.isnan(score) else float(score) for score in findings.anchors.scores],
        "top": findings.anchors.ranking()[:_TOP].tolist(),
        "routes": _routes(findings),
    }
    pool = masks["step"] // findings.block_size
    unobserved = np.mean([layer.unobserved.mean() for layer in findings.mass])
    page = Template(files.joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        model=escape(str(findings.masks.metadata["model"])),
        plotly=get_plotlyjs(),
        facts=_facts(findings),
        block_size=findings.block_size,
        share=_share(findings),
        pooled=f" The context is long: a cell stands for {pool} by {pool} blocks, the largest share." * (pool > 1),
        receivers=len(findings.anchors.receivers),
        grouped=f" The context is long: a row or column stands for {group} sentences." * (group > 1),
        gap=ANCHOR_GAP,
        unobserved=f"{unobserved:.1%}",
        top=_top(findings),
        routes=_routes_section(findings),
        data=_json(data),
        shares=resources.files("stream_monitor.plots").joinpath("shares.js").read_text(encoding="utf-8"),
        script=files.joinpath("report.js").read_text(encoding="utf-8"),
    )


def _json(values: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(values, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _masks(findings: Findings) -> dict[str, Any]:
    """The filled cells of all layers and heads, compressed (see `unpack` in report.js)."""
    every = []
    heads = int(findings.masks.metadata["query_heads"])
    for layer in findings.masks:
        every += [mask_cells(layer, head) for head in range(heads)]
    rows, columns, shares = (
        np.concatenate([getattr(one, name) for one in every]) for name in ("row", "column", "share")
    )
    # Like beside like compresses to half of what entry after entry does.
    planes = rows.astype("<u2"), columns.astype("<u2"), np.round(255 * np.sqrt(shares.clip(0, 1))).astype("u1")
    return {
        "entries": base64.b64encode(zlib.compress(b"".join(plane.tobytes() for plane in planes))).decode(),
        "counts": [len(one.share) for one in every],
        "side": every[0].side,
        "step": every[0].pool * findings.block_size,
        "tokens": len(findings.masks.metadata["tokens"]),
        "layers": findings.masks.layers,
        "heads": heads,
        "receivers": [list(head) for head in findings.anchors.receivers],
        "windows": findings.masks.metadata["windows"],
    }


def _share(findings: Findings) -> str:
    reduction = findings.masks.metadata["reduction"]
    which = "mean" if reduction == "mean" else "largest"
    return f"A cell's colour is the share of attention it gets, the {which} over the rows of the block that reads."


def _facts(findings: Findings) -> str:
    """Rows of the table at the top."""
    summary, metadata = findings.summary, findings.masks.metadata
    search = metadata["search"]
    then = "the kept blocks alone" if metadata["attention"] == "pruned" else "everything (masks are laid over it)"
    facts = {
        "Context": f"{summary['tokens']:,} tokens, {len(findings.sentences):,} sentences",
        "Search": f"{search['strategy']}, top {search['top_k']} of blocks of {search['block_size']} tokens, and "
        f"{search['sink_blocks']} first and {search['recent_blocks']} recent blocks always",
        "Pruned": f"{summary['pruned_of_causal']:.1%} of what the layers could read, {summary['pruned_of_square']:.1%} "
        "of the full square; forced blocks count as kept",
        "Each layer attended to": then,
        "Next token": repr(summary["next_token"]),
    }
    if summary["windows"]:
        facts["Sliding windows"] = f"in layers {', '.join(summary['windows'])}: masks lie inside them"
    return _table(facts)


def _table(rows: dict[str, str]) -> str:
    return "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())


def _top(findings: Findings) -> str:
    """Rows of the highest anchors."""
    return _table(
        {
            f"{rank}. sentence {number}": findings.sentences[number].text.strip()[:_LONGEST_TEXT]
            for rank, number in enumerate(findings.anchors.ranking()[:_TOP], 1)
        }
    )


def _routes(findings: Findings) -> dict[str, Any] | None:
    routes = findings.routes
    if routes is None or not routes.strength:
        return None
    return {
        "hops": [vars(hop) for hop in routes.strongest_edges(_EDGES)],
        "corners": routes.corners(),
        "blocks": routes.blocks,
        "layers": len(routes.layers),
    }


def _routes_section(findings: Findings) -> str:
    """Heading, words and place for the graph; empty if no needle was named."""
    routes = findings.routes
    if routes is None:
        return ""
    named = f"<h2>Routes from the needle to the answer</h2><p>The needle is <q>{escape(findings.needle or '')}</q>. "
    if not routes.strength:
        return named + "No chain of kept blocks leads from it to the answer.</p>"
    return named + (
        f"It stands in block {routes.sources[0]}; the answer is written from block {routes.target}. In each layer a "
        "block keeps what it has or reads an earlier block; an edge weighs the largest share that any head gives it, "
        "and a route is as strong as the product of its weights: an upper bound on what attention can carry, not a "
        f"measure of what it did carry. The strongest route has {len(routes.path)} reads and strength "
        f"{routes.strength:.3g}; other edges are the fainter the weaker the best route through them.</p>"
        '<div id="routes"></div>' + _compared(findings)
    )


def _compared(findings: Findings) -> str:
    """The edges that differ most from another trace's; empty if none was named."""
    comparison = findings.comparison
    if comparison is None:
        return ""
    rows = "".join(
        f"<tr><td>{hop.layer}</td><td>{hop.query_block}</td><td>{hop.key_block}</td><td>{hop.through:.3g}</td>"
        f"<td>{hop.through - difference:.3g}</td><td>{difference:+.3g}</td></tr>"
        for hop, difference in comparison.edges[:_TOP]
    )
    return (
        f"<h3>Beside another trace</h3><p>The strongest route of <q>{escape(comparison.other)}</q> has strength "
        f"{comparison.strength:.3g}. Edges by how much the best route through them differs:</p>"
        "<table><tr><th>layer</th><th>block</th><th>reads block</th><th>here</th><th>there</th><th>difference</th></tr>"
        f"{rows}</table>"
    )
