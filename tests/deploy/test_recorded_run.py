"""One recorded run on a real Prometheus: every event kind, every reason of a loss, every alert, every query.

    pytest -m long tests/deploy/test_recorded_run.py

A monitor process is fed by synthetic publishers over real gRPC and scraped by Debian's Prometheus with our rules, in
which time passes 60 times faster (real_prometheus.py). vLLM's own metrics are the exposition of a real server with the
figures of load moving (vllm_exposition.py).
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stream_monitor.anchors.panel import Kind
from stream_monitor.monitor import outcomes
from tests.deploy.fleet import ENDING_CERTIFICATE, FRESH_CERTIFICATE, NEW_PROFILE, OLD_PROFILE, Fleet, every
from tests.deploy.promql import ROOT, rules
from tests.deploy.real_prometheus import Prometheus, scaled_expression
from tests.deploy.vllm_exposition import VllmExposition
from tests.monitor.test_server import free_port

SCALE = 60
BOARD = json.loads((ROOT / "deploy/grafana/stream-monitor.json").read_text())


@dataclass
class Run:
    """What was seen while it went on."""

    prometheus: Prometheus
    fleet: Fleet
    vllm: VllmExposition
    annotations: dict[str, dict[str, str]] = field(default_factory=dict)

    def watch(self) -> None:
        """Keep what the alerts that fire now say."""
        for alert in self.prometheus.get("alerts")["alerts"]:
            if alert["state"] == "firing":
                self.annotations[alert["labels"]["alertname"]] = alert["annotations"]

    def wrong(self, seconds: float) -> None:
        """Everything goes wrong at once, engines and monitor keep up."""
        fleet = self.fleet
        fleet.connect_all()
        fleet.main.full = True
        fleet.discard_rows()
        fleet.delete()
        with fleet.locked_store():
            for _ in every(seconds):
                fleet.lose_rows()
                fleet.calm(late=5.0, recalls=(0.4,) * 5)
                fleet.others()
                fleet.break_the_contract()
                self.watch()
        fleet.main.full = False

    def calm(self, seconds: float, **more: object) -> None:
        """Ordinary traffic."""
        for _ in every(seconds):
            self.fleet.calm(**more)  # type: ignore[arg-type]
            self.watch()

    def find(self) -> None:
        """Findings of every kind: enough to be unusual, and not so many that the calm after them is."""
        for _ in range(7):
            self.fleet.calm()
            self.fleet.find()
            self.watch()
            time.sleep(0.5)

    def quiet(self, seconds: float) -> None:
        """Nothing."""
        for _ in every(seconds):
            self.watch()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    fleet = Fleet(tmp_path, free_port(), free_port())
    vllm = VllmExposition()
    fleet.start_monitor(OLD_PROFILE, ENDING_CERTIFICATE)
    targets = {"vllm": vllm.address, "stream-monitor": fleet.metrics}
    try:
        with Prometheus(tmp_path, free_port(), targets, SCALE) as prometheus:
            yield Run(prometheus, fleet, vllm)
    finally:
        fleet.close()
        vllm.close()


def firing(prometheus: Prometheus) -> dict[tuple[str, str], list[float]]:
    """Alert and severity to the times at which it was firing."""
    found: dict[tuple[str, str], list[float]] = {}
    for labels, values in prometheus.over_the_run('ALERTS{alertstate="firing"}'):
        found.setdefault((labels["alertname"], labels["severity"]), []).extend(at for at, _ in values)
    return found


def queries(scale: int) -> Iterator[tuple[str, str]]:
    """Of the rules, at that scale, and of the panels, with their variables filled in."""
    for rule in (*rules("record"), *rules("alert")):
        yield rule.get("record") or rule["alert"], scaled_expression(rule["expr"], scale)
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "4s").replace("$__range", "5m")
            for variable in ("job", "model_name", "engine"):
                expression = expression.replace(f"${variable}", ".*")
            yield f"{panel['title']} {target['refId']}", expression


def silent_queries(prometheus: Prometheus) -> list[str]:
    """Names of those that never had a value other than 0."""
    return [
        name
        for name, expression in queries(prometheus.scale)
        if not any(
            value and math.isfinite(value) for _, values in prometheus.over_the_run(expression) for _, value in values
        )
    ]


NEED_LIMITS = {("refused", "other_tenant"), ("refused", "message_rate")}
"""Refusals of a monitor with an access file or a limit on messages, which this one has not (tests/security)."""


def labels_that_rose(prometheus: Prometheus, metric: str, *names: str) -> set[tuple[str, ...]]:
    """Label values of series of a counter that were not 0 at some time."""
    return {
        tuple(labels.get(name, "") for name in names)
        for labels, values in prometheus.over_the_run(metric)
        if any(value > 0 for _, value in values)
    }


def check_labels(prometheus: Prometheus) -> None:
    """Every kind of event, every reason of a loss and of a refusal."""
    kinds = labels_that_rose(prometheus, "stream_monitor_events_total", "kind")
    assert kinds == {(kind.name,) for kind in Kind}
    rows = labels_that_rose(prometheus, "stream_monitor_rows_total", "outcome", "reason")
    assert rows == {(outcome, reason) for outcome, (_, reasons) in outcomes.ROWS.items() for reason in reasons}
    messages = labels_that_rose(prometheus, "stream_monitor_messages_total", "outcome", "reason")
    assert messages | NEED_LIMITS == {
        (o, reason) for o, (_, reasons) in outcomes.MESSAGES.items() for reason in reasons
    }
    requests = labels_that_rose(prometheus, "stream_monitor_requests_refused_total", "reason")
    assert requests == {(reason,) for reason in outcomes.REQUESTS}
    arguments = labels_that_rose(prometheus, "stream_monitor_request_arguments_refused_total", "argument", "reason")
    assert arguments == set(outcomes.ARGUMENTS)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_alert_fires_and_resolves_and_every_query_has_data(run: Run) -> None:
    began = time.time()
    fleet, prometheus = run.fleet, run.prometheus
    run.calm(4)
    run.vllm.begin()
    run.calm(28)
    quiet_so_far = firing(prometheus)
    fleet.subscribe_without_reading()
    run.wrong(30)
    fleet.forget_subscriber()
    fleet.disconnect()
    run.calm(15, recalls=(0.99,) * 40)
    run.find()
    run.calm(6)
    fleet.disconnect()
    run.quiet(14)
    fleet.stop_monitor()
    run.quiet(10)
    fleet.start_monitor(NEW_PROFILE, FRESH_CERTIFICATE)
    run.calm(70)

    ups = [value for _, values in prometheus.over_the_run("up") for _, value in values]
    print(f"{sum(ups) / len(ups):.1%} of the scrapes succeeded, those of a stopped monitor included")
    fired = firing(prometheus)
    for (alert, severity), times in sorted(fired.items(), key=lambda each: min(each[1])):
        print(f"{alert} ({severity}) from {min(times) - began:.0f} s to {max(times) - began:.0f} s")
    silent = silent_queries(prometheus)
    print(f"queries without data: {silent}")
    wanted = {(rule["alert"], rule["labels"]["severity"]) for rule in rules("alert")}
    # The old profile and the old certificate were there from the start.
    old = {("StreamMonitorProfileStale", "warning"), ("StreamMonitorCertificateExpiring", "warning")}
    assert set(quiet_so_far) <= old
    assert set(fired) == wanted
    now = time.time()
    assert {alert: now - max(times) for alert, times in fired.items() if now - max(times) < 2} == {}
    for name, said in run.annotations.items():
        assert not any("<error" in text or "<no value>" in text for text in said.values()), (name, said)
    assert set(run.annotations) == {name for name, _ in wanted}
    assert prometheus.unhealthy_rules() == []
    assert silent == []
    check_labels(prometheus)
    assert {"request_id"} == {key for labels in prometheus.exemplars("stream_monitor_events_total") for key in labels}
    print(f"{len(wanted)} alerts fired and resolved in {now - began:.0f} s")


@pytest.mark.timeout(180)
def test_a_short_run_raises_what_takes_no_long_window(run: Run) -> None:
    run.calm(3)
    run.vllm.begin()
    run.calm(2)
    run.wrong(14)
    run.find()
    fired = {name for name, _ in firing(run.prometheus)}
    assert {
        "StreamMonitorCaptureFaulty",
        "StreamMonitorMessagesRefused",
        "StreamMonitorQueueFilling",
        "StreamMonitorRowsDropped",
        "StreamMonitorUntrustedAnchor",
    } <= fired
    assert not fired & {"StreamMonitorAbsent", "StreamMonitorBlind"}
    assert run.prometheus.unhealthy_rules() == []
    check_labels(run.prometheus)
    for _, expression in queries(SCALE):
        run.prometheus.over_the_run(expression)
