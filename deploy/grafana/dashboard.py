"""Prints the dashboard as Grafana's JSON: `make docs` writes stream-monitor.json, a test compares the two."""

import json

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as models
from health import cost, seeing
from panels import OURS, SOURCE, plain, runbook, variable
from reasoning import anchored, shifts

RUNBOOK = "https://example.com/docs/runbook.md"
"""Default of the variable `runbook`: where the pages of docs/ are published is yours to say."""


def annotations() -> list[dashboard.AnnotationQuery]:
    """Findings and firing alerts, as marks on every panel."""
    found = f"sum by (model_name, kind) (increase(stream_monitor_events_total{{{OURS}}}[$__rate_interval])) > 0"
    firing = 'ALERTS{alertname=~"StreamMonitor.*", alertstate="firing"}'
    return [
        dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(enable).icon_color(color).expr(expr)
        for name, enable, color, expr in (
            ("Findings", False, "orange", found),
            ("Alerts", True, "red", firing),
        )
    ]


ANNOTATION_TEXT = {"Findings": "{{kind}} {{model_name}}", "Alerts": "{{alertname}} {{model_name}} {{engine}}"}
"""The SDK's type of an annotation lacks the field for it."""


def build() -> dict:
    """The dashboard as plain values."""
    board = (
        dashboard.Dashboard("Stream Monitor")
        .uid("stream-monitor")
        .description("What the reasoning that vLLM serves rests on, and whether the monitor sees it.")
        .tags(["vllm", "stream-monitor"])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(runbook("StreamMonitorBlind").title("Runbook").url("${runbook}"))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(variable("job", "Monitor job", "label_values(stream_monitor_build_info, job)"))
    )
    engines = '{__name__=~"stream_monitor_ranks_connected|vllm:num_requests_running"}'
    board.with_variable(variable("model_name", "Model", f"label_values({engines}, model_name)"))
    chosen = engines.removesuffix("}") + ', model_name=~"$model_name"}'
    board.with_variable(variable("engine", "Engine", f"label_values({chosen}, engine)"))
    board.with_variable(
        dashboard.ConstantVariable("runbook").label("Address of docs/runbook.md, as published").value(RUNBOOK)
    )
    for annotation in annotations():
        board.annotation(annotation)
    for title, panels in (
        ("Is the monitor seeing?", seeing()),
        ("What is reasoning anchored on?", anchored()),
        ("Shifts", shifts()),
        ("Cost", cost()),
    ):
        board.with_row(dashboard.Row(title))
        for panel in panels:
            board.with_panel(panel)
    content = plain(board)
    for annotation in content["annotations"]["list"]:
        annotation["titleFormat"] = ANNOTATION_TEXT[annotation["name"]]
    return content


if __name__ == "__main__":
    print(json.dumps(build(), indent=2, sort_keys=True))
