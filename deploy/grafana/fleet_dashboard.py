"""Prints the dashboard of a fleet (docs/fleet.md): `make docs` writes fleet/stream-monitor-fleet.json."""

import json

from grafana_foundation_sdk.builders import dashboard, stat, timeseries
from grafana_foundation_sdk.models import dashboard as models
from panels import GREEN_BELOW_1, MONITOR, Query, curve, number, plain, rate, variable

FLEET = 'job=~"$fleet_job"'
BY_PROCESS = "by (instance)"
GREEN_FROM_1 = {"steps": ((None, "red"), (1.0, "green"))}


def publishing() -> list[stat.Panel | timeseries.Panel]:
    """Row 1: what monitors publish."""
    lost = f'rate(stream_monitor_nats_lost_total{{{MONITOR}, reason!="deleted"}}[$__rate_interval])'
    return [
        number(
            "Monitors cut off",
            "none",
            "Monitors that are not connected to the broker, or whose messages it does not take.",
            Query(f"sum(1 - stream_monitor_nats_up{{{MONITOR}}})", "cut off"),
            empty="No monitor publishes",
            **GREEN_BELOW_1,
        ),
        number(
            "Monitors that publish",
            "none",
            "Monitors with a broker in their settings, whether it can be reached or not.",
            Query(f"count(stream_monitor_nats_up{{{MONITOR}}})", "monitors"),
            empty="No monitor publishes",
        ),
        curve(
            "Waiting for the broker",
            "none",
            "Findings, traces and deletions that a monitor has to publish still.",
            Query(f"sum by (record) (stream_monitor_nats_outbox_records{{{MONITOR}}})", "{{record}}"),
            stacked=True,
        ),
        curve(
            "Published",
            "cps",
            "Messages that the broker acknowledged, and traces that were too large for it with single heads.",
            Query(rate("stream_monitor_nats_sent_total", MONITOR, "by (record)"), "{{record}}"),
            Query(rate("stream_monitor_nats_shortened_total", MONITOR, ""), "without heads"),
        ),
        curve(
            "Not published, by reason",
            "cps",
            "What the fleet will never see; the monitor itself has it.",
            Query(f"sum by (record, reason) ({lost}) > 0", "{{record}} {{reason}}"),
            stacked=True,
        ),
        curve(
            "What went wrong with the broker",
            "cps",
            "Failures of monitors and of processes of the fleet, by reason.",
            Query(rate("stream_monitor_nats_failures_total", MONITOR, "by (reason)") + " > 0", "monitor: {{reason}}"),
            Query(rate("stream_monitor_fleet_failures_total", FLEET, "by (reason)") + " > 0", "fleet: {{reason}}"),
        ),
    ]


def reading() -> list[stat.Panel | timeseries.Panel]:
    """Row 2: whether processes of the fleet know what was published."""
    delay = rate("stream_monitor_fleet_event_delay_seconds_bucket", FLEET, "by (le)")
    return [
        number(
            "Processes cut off",
            "none",
            "Processes that are not connected to the broker: they answer from what they have read.",
            Query(f"sum(1 - stream_monitor_fleet_up{{{FLEET}}})", "cut off"),
            empty="No fleet",
            **GREEN_BELOW_1,
        ),
        number(
            "Processes",
            "none",
            "Processes of the fleet that are scraped.",
            Query(f"count(stream_monitor_fleet_up{{{FLEET}}})", "processes"),
            empty="No fleet",
        ),
        number(
            "Stores that can be written",
            "none",
            "While a process cannot write its store, it reads nothing more. The lowest: 1 if all can.",
            Query(f"min(stream_monitor_fleet_store_up{{{FLEET}}})", "lowest"),
            empty="No fleet",
            **GREEN_FROM_1,
        ),
        number(
            "Findings behind their sentence",
            "s",
            "99% of the findings reach a process's subscribers this soon after the step that closed their sentence.",
            Query(f"histogram_quantile(0.99, {delay})", "p99"),
            steps=((None, "green"), (5.0, "red")),
        ),
        curve(
            "Not read yet",
            "none",
            "Messages of the stream that a process has not read, as of the last one that it has.",
            Query(f"max {BY_PROCESS} (stream_monitor_fleet_lag_messages{{{FLEET}}})", "{{instance}}"),
        ),
        curve(
            "How far they have read",
            "none",
            "Place in the stream: the same on all processes, in time.",
            Query(f"max {BY_PROCESS} (stream_monitor_fleet_position{{{FLEET}}})", "{{instance}}"),
        ),
        curve(
            "Read",
            "cps",
            "Messages by what became of them; expired is what the stream let go before a process read it.",
            Query(
                rate("stream_monitor_fleet_messages_total", FLEET, "by (record, outcome)") + " > 0",
                "{{record}} {{outcome}}",
            ),
            Query(rate("stream_monitor_fleet_expired_messages_total", FLEET, "") + " > 0", "expired"),
        ),
        curve(
            "Delay of findings",
            "s",
            "From the engine's step to the subscribers of a process; those read after an outage, too.",
            Query(f"histogram_quantile(0.5, {delay})", "p50"),
            Query(f"histogram_quantile(0.99, {delay})", "p99"),
        ),
    ]


def serving() -> list[stat.Panel | timeseries.Panel]:
    """Row 3: what processes of the fleet hold, whom they serve, and at what cost."""
    commits = rate("stream_monitor_fleet_commit_seconds_bucket", FLEET, "by (instance, le)")
    refused = "by (where, reason)"
    return [
        curve(
            "Held",
            "none",
            "Findings and traces in the store of a process, the mean over processes.",
            Query(f"avg by (record) (stream_monitor_fleet_held{{{FLEET}}})", "{{record}}"),
        ),
        curve(
            "Subscribers",
            "none",
            "Connected to each process.",
            Query(f"sum {BY_PROCESS} (stream_monitor_fleet_subscribers{{{FLEET}}})", "{{instance}}"),
        ),
        curve(
            "Lost to subscribers, turned away, deleted",
            "cps",
            "Events lost to slow subscribers, who are told; clients and pages that were refused; requests deleted.",
            Query(rate("stream_monitor_fleet_subscriber_events_lost_total", FLEET, ""), "events lost"),
            Query(rate("stream_monitor_fleet_access_refused_total", FLEET, refused) + " > 0", "{{where}}: {{reason}}"),
            Query(rate("stream_monitor_fleet_page_refused_total", FLEET, "by (reason)") + " > 0", "page: {{reason}}"),
            Query(rate("stream_monitor_fleet_requests_deleted_total", FLEET, ""), "deleted"),
        ),
        curve(
            "To keep what was read",
            "s",
            "99% of the commits to a process's store take no longer.",
            Query(f"histogram_quantile(0.99, {commits})", "{{instance}}"),
        ),
        curve(
            "CPU of the processes",
            "percentunit",
            "Part of one CPU.",
            Query(rate("process_cpu_seconds_total", FLEET, BY_PROCESS), "{{instance}}"),
        ),
        curve(
            "Memory of the processes",
            "bytes",
            "Resident memory.",
            Query(f"sum {BY_PROCESS} (process_resident_memory_bytes{{{FLEET}}})", "{{instance}}"),
        ),
        number(
            "Certificate, time left",
            "s",
            "Until the certificate that a process shows, or the last CA by which it knows clients, expires.",
            Query(f"min(stream_monitor_fleet_tls_expiry_timestamp_seconds{{{FLEET}}}) - time()", "left"),
            steps=((None, "red"), (7 * 86400.0, "green")),
            empty="No TLS",
        ),
        number(
            "Damaged stores set aside",
            "none",
            "In the range shown; what they held is read anew from the stream.",
            Query(f"sum(increase(stream_monitor_fleet_store_set_aside_total{{{FLEET}}}[$__range]))", "set aside"),
            empty="No fleet",
            **GREEN_BELOW_1,
        ),
    ]


def build() -> dict:
    """The dashboard as plain values."""
    board = (
        dashboard.Dashboard("Stream Monitor fleet")
        .uid("stream-monitor-fleet")
        .description("Whether what many monitors see reaches the processes that answer for all of them.")
        .tags(["vllm", "stream-monitor"])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(variable("job", "Monitor job", "label_values(stream_monitor_nats_up, job)"))
        .with_variable(variable("fleet_job", "Fleet job", "label_values(stream_monitor_fleet_build_info, job)"))
    )
    for title, panels in (
        ("Do monitors reach the broker?", publishing()),
        ("Does the fleet know what they published?", reading()),
        ("What the fleet holds and serves", serving()),
    ):
        board.with_row(dashboard.Row(title))
        for panel in panels:
            board.with_panel(panel)
    return plain(board)


if __name__ == "__main__":
    print(json.dumps(build(), indent=2, sort_keys=True))
