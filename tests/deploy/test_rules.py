"""Rules, alerts, their routes and the runbook, by Prometheus's and Alertmanager's own tools."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from stream_monitor.monitor import outcomes
from tests.deploy.promql import ROOT, RULES, known_metrics, metrics_in, rules

UNIT_TESTS = sorted((ROOT / "deploy/prometheus/tests").glob("*.yaml"))
ALERTMANAGER = ROOT / "deploy/alertmanager/alertmanager.yaml"
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
ALERTS = rules("alert")
QUERIES = re.findall(r"```promql\n(.*?)```", RUNBOOK, re.DOTALL)


def tool(*command: object, given: str | None = None) -> str:
    done = subprocess.run(list(map(str, command)), input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_the_rules() -> None:
    tool("promtool", "check", "rules", *RULES)


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_the_unit_tests_pass(path: Path) -> None:
    tool("promtool", "test", "rules", path)


def test_each_alert_is_tested_to_fire_and_not_to_fire() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for path in UNIT_TESTS:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for expected in case["promql_expr_test"]:
                (found := fires if expected["exp_samples"] else silent).update(
                    re.findall(r'alertname="(\w+)"', expected["expr"])
                )
                assert found is not None
    names = {alert["alert"] for alert in ALERTS}
    assert fires == names
    assert silent == names


def test_the_alerts_are_well_formed() -> None:
    groups = {group["name"]: group["rules"] for group in yaml.safe_load(RULES[1].read_text())["groups"]}
    blindness = {rule["alert"] for rule in groups["stream-monitor-blindness"]}
    for alert in ALERTS:
        assert re.fullmatch(r"StreamMonitor([A-Z][a-z]+)+", alert["alert"])
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("critical", "warning")
        # Only the monitor's own blindness pages.
        assert alert["labels"]["severity"] == "warning" or alert["alert"] in blindness


def test_the_runbook_has_a_heading_for_each_alert_and_says_the_five_things() -> None:
    sections = re.split(r"^## ", RUNBOOK, flags=re.MULTILINE)[1:]
    found = {section.split("\n", 1)[0]: section for section in sections}
    assert [name for name in found if name.startswith("Stream")] == list(dict.fromkeys(a["alert"] for a in ALERTS))
    for name, section in found.items():
        if name.startswith("Stream"):
            said = re.findall(r"^\*\*([\w ]+)\*\*", section, re.MULTILINE)
            assert said == ["Means", "How bad", "Look at", "Do", "Silence"], name


def test_queries_name_metrics_that_exist() -> None:
    expressions = [rule["expr"] for rule in (*ALERTS, *rules("record"))] + QUERIES
    used = set().union(*map(metrics_in, expressions))
    assert used - known_metrics() == set()
    assert {"stream_monitor_rows_total", "engine:stream_monitor_coverage:ratio_rate5m"} < used
    assert "vllm:generation_tokens_total" in used


def test_the_queries_of_the_runbook_can_be_parsed(tmp_path: Path) -> None:
    lines = [line for query in QUERIES for line in query.strip().splitlines()]
    found = [{"record": f"x:{index}:y", "expr": line} for index, line in enumerate(lines)]
    content = {"groups": [{"name": "runbook", "rules": found}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(content))
    tool("promtool", "check", "rules", tmp_path / "rules.yaml")
    assert len(lines) > 20


def test_coverage_leaves_out_what_the_page_says() -> None:
    (wanted,) = [r["expr"] for r in rules("record") if r["record"] == "engine:stream_monitor_rows_wanted:rate5m"]
    assert "|".join(outcomes.REPLACED) in wanted


def test_amtool_accepts_the_example_and_only_blindness_pages() -> None:
    tool("amtool", "check-config", ALERTMANAGER)
    for alert in ALERTS:
        labels = [f"alertname={alert['alert']}", f"severity={alert['labels']['severity']}"]
        receiver = tool("amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}", *labels).strip()
        assert receiver == ("page" if alert["labels"]["severity"] == "critical" else "tickets")


def test_inhibitions_name_alerts_that_exist() -> None:
    names = {alert["alert"] for alert in ALERTS}
    for rule in yaml.safe_load(ALERTMANAGER.read_text())["inhibit_rules"]:
        for matchers in (rule["source_matchers"], rule["target_matchers"]):
            (pattern,) = re.findall(r'alertname=~?"([^"]+)"', " ".join(matchers))
            assert [name for name in names if re.fullmatch(pattern, name)], pattern
            for part in re.sub(r"StreamMonitor\((.*)\)", r"\1", pattern).split("|"):
                assert f"StreamMonitor{part.removeprefix('StreamMonitor')}" in names
