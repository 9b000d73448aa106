"""The report of a trace in a real browser: drawn, without a network, and as the masks are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, sync_playwright

from stream_kernels.search import NO_BLOCK, SearchConfig
from stream_monitor.tracing.layer import TraceOptions
from stream_monitor.tracing.masks import MaskFile
from stream_monitor.tracing.model import TracedModel
from stream_monitor.tracing.report_writer import ReportWriter
from stream_monitor.tracing.trace import trace
from tests.monitor.page.conftest import CHROMIUM, FLAGS

TEXT = "The code is 4711. " + "".join(f"Then comes line {number}, and so on. " for number in range(40)) + "And?"


@pytest.fixture(scope="module")
def traced(tiny_model: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = tiny_model.prompt_tokens(TEXT)
    options = TraceOptions(SearchConfig(strategy="beam", block_size=8, top_k=2))
    out = tmp_path_factory.mktemp("traced") / "out"
    return trace(tiny_model, ids, options, out, companion=ReportWriter(tiny_model, ids, 8, "4711")).out


@pytest.fixture(scope="module")
def page(traced: Path) -> Iterator[Page]:
    """The report, once it is drawn; no request but for the file, and no error."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((traced / "report.html").as_uri())
        page.wait_for_selector("#masks .heatmaplayer image", state="attached")
        yield page
        assert errors == []
        assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}
        browser.close()


def drawn(page: Page) -> list[list[float | None]]:
    """Log shares in the heat map of masks."""
    cells: list[list[float | None]] = page.evaluate("document.getElementById('masks').data[0].z")
    return cells


@pytest.mark.parametrize(("layer", "head"), [(2, 3), (0, 1), (1, -1)])
def test_the_masks_chosen_are_drawn(page: Page, traced: Path, layer: int, head: int) -> None:
    page.select_option("#layer", str(layer))
    page.select_option("#head", str(head))
    stored = MaskFile(traced / "masks.parquet").layer(layer)
    expected: dict[tuple[int, int], float] = {}
    for one in range(4) if head < 0 else [head]:
        for ids, shares in (
            (stored.block_ids[:, one], stored.block_shares[:, one]),
            (stored.forced_ids, stored.forced_shares[:, one]),
        ):
            for block, place in np.ndindex(ids.shape):
                if ids[block, place] != NO_BLOCK:
                    cell = (block, int(ids[block, place]))
                    expected[cell] = max(expected.get(cell, 0.0), float(shares[block, place]))
    found = {
        (row, column): 10**share
        for row, cells in enumerate(drawn(page))
        for column, share in enumerate(cells)
        if share is not None
    }
    assert found.keys() == expected.keys()
    for cell, share in expected.items():
        assert found[cell] == pytest.approx(max(share, 1e-3), abs=0.005)


def test_a_cell_of_the_masks_covers_its_tokens_and_names_them(page: Page, traced: Path) -> None:
    page.select_option("#layer", "1")
    page.select_option("#head", "-1")
    tokens = len(MaskFile(traced / "masks.parquet").metadata["tokens"])
    last = (tokens - 1) // 8 * 8
    assert last < tokens - 1 < last + 7, "the last block is cut short"
    page.locator("#masks").scroll_into_view_if_needed()
    for query, span in ((8, "8 to 15"), (15, "8 to 15"), (tokens - 1, f"{last:,} to {tokens - 1:,}")):
        # Closer in, where a token is some pixels wide.
        page.evaluate(
            "(range) => Plotly.relayout('masks', range)",
            {"xaxis.range": [-10, 50], "yaxis.range": [query + 30, query - 30]},
        )
        for key in (0, 7):
            x, y = page.evaluate(
                "([key, query]) => { const { xaxis, yaxis } = document.getElementById('masks')._fullLayout;"
                " const box = document.querySelector('#masks .nsewdrag').getBoundingClientRect();"
                " return [box.x + xaxis.l2p(key), box.y + yaxis.l2p(query)] }",
                [key, query],
            )
            page.mouse.move(x, y)
            said = page.locator("#masks .hovertext", has_text=f"queries of tokens {span}keys of tokens 0 to 7")
            said.wait_for()
            page.mouse.move(0, 0)
            said.wait_for(state="detached")


def test_sentences_anchors_and_routes_are_drawn_and_speak(page: Page) -> None:
    shown: dict[str, Any] = page.evaluate(
        "Object.fromEntries(['sentences', 'anchors', 'routes'].map("
        "(id) => [id, document.getElementById(id).querySelectorAll('image, .trace').length]))"
    )
    assert all(shown.values()), shown
    page.locator("#sentences").scroll_into_view_if_needed()
    box = page.locator("#sentences .nsewdrag").bounding_box()
    assert box is not None
    # The lower left corner: the last sentence reads the first.
    page.mouse.move(box["x"] + 8, box["y"] + box["height"] - 8, steps=4)
    page.wait_for_function("document.getElementById('sentences-said').textContent.includes('The code is 4711.')")
