"""The dashboard: current, of the SDK's types, laid out without overlap, and asking only for what there is."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations

import pytest
from grafana_foundation_sdk.models import dashboard

from tests.deploy.promql import ROOT, known_metrics, metrics_in, rules

FILE = ROOT / "deploy/grafana/stream-monitor.json"
BOARD = json.loads(FILE.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TITLES = [panel["title"] for panel in PANELS]
RUNBOOK = (ROOT / "docs/runbook.md").read_text()


def expressions() -> Iterator[tuple[str, str]]:
    """Title of its panel and each query."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for annotation in BOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


QUERIES = list(expressions())


def test_the_dashboard_is_current() -> None:
    printed = subprocess.run(
        [sys.executable, "deploy/grafana/dashboard.py"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert FILE.read_text() == printed, "run make docs"


def test_grafanas_own_types_can_hold_it() -> None:
    held = dashboard.Dashboard.from_json(BOARD)
    assert held.panels is not None
    assert [panel.title for panel in held.panels] == [panel["title"] for panel in BOARD["panels"]]
    names = [variable["name"] for variable in BOARD["templating"]["list"]]
    assert names == ["datasource", "job", "model_name", "engine", "runbook"]


def test_it_has_the_four_rows() -> None:
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Is the monitor seeing?", "What is reasoning anchored on?", "Shifts", "Cost"]


def test_panels_do_not_overlap_and_stay_in_24_columns() -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in BOARD["panels"]]
    for _, place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
    for (one, a), (other, b) in combinations(places, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (one, other)
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("panel", PANELS, ids=TITLES)
def test_a_panel_says_what_it_shows_in_what_unit_and_what_it_says_without_traffic(panel: dict) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["description"].endswith(".")
    assert defaults["unit"]
    assert defaults["noValue"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def test_queries_name_metrics_that_exist() -> None:
    assert len(set(TITLES)) == len(TITLES)
    used = set().union(*(metrics_in(expr) for _, expr in QUERIES))
    assert used - known_metrics() == set()
    assert len(used) > 50


@pytest.mark.parametrize(("title", "expr"), QUERIES, ids=[f"{title}-{i}" for i, (title, _) in enumerate(QUERIES)])
def test_a_query_keeps_the_rules(title: str, expr: str) -> None:
    variables = set(re.findall(r"\$(\w+)", expr))
    assert variables <= {"job", "model_name", "engine", "__rate_interval", "__range"}
    for metric, labels in re.findall(r"((?:stream_monitor|vllm:|engine\w*:)[\w:]+)\{([^}]*)\}", expr):
        if metric.startswith("stream_monitor_"):
            assert '$job"' in labels, metric
        elif metric.startswith("vllm:"):
            assert 'model_name=~"$model_name", engine=~"$engine"' in labels
    # Rates follow the range shown; a fixed window is one that the title names.
    fixed = re.findall(r"\[(\d+\w)\]", expr)
    assert all(f"{window[:-1]} min" in title for window in fixed)
    # What is divided by cannot be 0, or is a constant.
    without_strings = re.sub(r'"[^"]*"', "", expr)
    for divisor in re.findall(r" / (?:on \(\) group_left \(\) )?(.)", without_strings):
        assert divisor == "("
    assert without_strings.count(" / ") <= without_strings.count(" > 0)")


def test_links_lead_to_headings_of_the_runbook() -> None:
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)}
    linked = {link["url"] for panel in PANELS for link in panel.get("links", [])}
    anchors = {url.removeprefix("${runbook}#") for url in linked}
    assert anchors <= headings
    # Whatever alerts can be seen on the dashboard, but for a monitor that is not there.
    assert anchors == {rule["alert"].lower() for rule in rules("alert")} - {"streammonitorabsent"}
