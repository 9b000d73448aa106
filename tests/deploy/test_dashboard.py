"""The dashboards: current, of the SDK's types, laid out without overlap, and asking only for what there is."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models import dashboard

from stream_monitor.monitor.fleet.metric_table import FLEET_TABLE
from stream_monitor.monitor.metric_table import TABLE
from tests.deploy.promql import ROOT, known_metrics, metrics_in, rules, series

GRAFANA = ROOT / "deploy/grafana"
FILES = {
    "dashboard.py": GRAFANA / "stream-monitor.json",
    "fleet_dashboard.py": GRAFANA / "fleet/stream-monitor-fleet.json",
}
"""By the script that writes it."""
BOARDS = {script: json.loads(file.read_text()) for script, file in FILES.items()}
BOARD, FLEET = BOARDS["dashboard.py"], BOARDS["fleet_dashboard.py"]
RUNBOOK = (ROOT / "docs/runbook.md").read_text()

Board = dict[str, Any]


def panels(board: Board) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(board: Board) -> Iterator[tuple[str, str]]:
    """Title of its panel and each query."""
    for panel in panels(board):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for annotation in board.get("annotations", {}).get("list", []):
        yield annotation["name"], annotation["expr"]


PANELS = [panel for board in BOARDS.values() for panel in panels(board)]
QUERIES = [query for board in BOARDS.values() for query in expressions(board)]


@pytest.mark.parametrize("script", FILES)
def test_the_dashboard_is_current(script: str) -> None:
    printed = subprocess.run(
        [sys.executable, f"deploy/grafana/{script}"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert FILES[script].read_text() == printed, "run make docs"


@pytest.mark.parametrize(
    ("board", "variables"),
    [
        (BOARD, ["datasource", "job", "model_name", "engine", "runbook"]),
        (FLEET, ["datasource", "job", "fleet_job"]),
    ],
    ids=["monitor", "fleet"],
)
def test_grafanas_own_types_can_hold_it(board: Board, variables: list[str]) -> None:
    held = dashboard.Dashboard.from_json(board)
    assert held.panels is not None
    assert [panel.title for panel in held.panels] == [panel["title"] for panel in board["panels"]]
    assert [variable["name"] for variable in board["templating"]["list"]] == variables


def test_they_have_these_rows() -> None:
    rows = [[panel["title"] for panel in board["panels"] if panel["type"] == "row"] for board in (BOARD, FLEET)]
    assert rows == [
        ["Is the monitor seeing?", "What is reasoning anchored on?", "Shifts", "Cost"],
        [
            "Do monitors reach the broker?",
            "Does the fleet know what they published?",
            "What the fleet holds and serves",
        ],
    ]


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_panels_do_not_overlap_and_stay_in_24_columns(board: Board) -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in board["panels"]]
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
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_a_panel_says_what_it_shows_in_what_unit_and_what_it_says_without_traffic(panel: dict) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["description"].endswith(".")
    assert defaults["unit"]
    assert defaults["noValue"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


@pytest.mark.parametrize(("board", "most"), [(BOARD, 50), (FLEET, 20)], ids=["monitor", "fleet"])
def test_queries_name_metrics_that_exist(board: Board, most: int) -> None:
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(titles)) == len(titles)
    used = set().union(*(metrics_in(expr) for _, expr in expressions(board)))
    assert used - known_metrics() - series(FLEET_TABLE) == set()
    assert len(used) > most


def test_the_fleets_dashboard_shows_every_metric_of_a_fleet() -> None:
    used = set().union(*(metrics_in(expr) for _, expr in expressions(FLEET)))
    shown = {name.removesuffix("_bucket") for name in used}
    every = {
        definition.name
        for definition in (*FLEET_TABLE, *TABLE)
        if "_nats_" in definition.name or "_fleet_" in definition.name
    }
    assert every - shown == {"stream_monitor_fleet_build_info", "stream_monitor_fleet_access_reloads_total"}


@pytest.mark.parametrize(("title", "expr"), QUERIES, ids=[f"{title}-{i}" for i, (title, _) in enumerate(QUERIES)])
def test_a_query_keeps_the_rules(title: str, expr: str) -> None:
    variables = set(re.findall(r"\$(\w+)", expr))
    assert variables <= {"job", "fleet_job", "model_name", "engine", "__rate_interval", "__range"}
    for metric, labels in re.findall(r"((?:stream_monitor|vllm:|engine\w*:)[\w:]+)\{([^}]*)\}", expr):
        if metric.startswith("stream_monitor_fleet_"):
            assert labels.startswith('job=~"$fleet_job"'), metric
        elif metric.startswith("stream_monitor_"):
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


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed; make tools does it")
def test_prometheus_can_parse_every_query(tmp_path: Path) -> None:
    rules_ = [
        {"record": f"query:number_{number}", "expr": re.sub(r"\$__\w+", "5m", expr)}
        for number, (_, expr) in enumerate(QUERIES)
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules_}]}))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_lead_to_headings_of_the_runbook() -> None:
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)}
    linked = {link["url"] for panel in panels(BOARD) for link in panel.get("links", [])}
    anchors = {url.removeprefix("${runbook}#") for url in linked}
    assert anchors <= headings
    # Whatever alerts can be seen on the dashboard, but for a monitor that is not there.
    assert anchors == {rule["alert"].lower() for rule in rules("alert")} - {"streammonitorabsent"}
