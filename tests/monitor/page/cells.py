"""The heat map's cells from both sides: as the browser has them, and as GetTrace says them."""

import numpy as np
from playwright.sync_api import Page

from stream_monitor.v1alpha1 import monitor_pb2

Cells = dict[tuple[int, int], float]
"""(sentence that reads, sentence that is read) -> share of its attention."""

_CELLS = """() => { const {x, y, z, customdata} = document.getElementById('heatmap').data[0];
  return y.flatMap((row, r) => x.map((column, c) => [row, column, customdata[r][c], z[r][c]])); }"""
DRAWN = "document.getElementById('heatmap')?.data?.[0]?.z?.length > 0"


def all_cells(page: Page) -> list[tuple[int, int, float | None, float | None]]:
    """Every cell that Plotly holds, the empty ones too: row, column, share, colour value."""
    return [tuple(cell) for cell in page.evaluate(_CELLS)]


def drawn(page: Page) -> Cells:
    """The cells that have a share."""
    return {(row, column): share for row, column, share, _ in all_cells(page) if share is not None}


def expected(trace: monitor_pb2.GetTraceResponse) -> Cells:
    """The sentence matrix."""
    row, column = (np.frombuffer(packed, "<u4").tolist() for packed in (trace.matrix_row, trace.matrix_column))
    shares = np.frombuffer(trace.matrix_share, "<f4").tolist()
    return dict(zip(zip(row, column, strict=True), shares, strict=True))
