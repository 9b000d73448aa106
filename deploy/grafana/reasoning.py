"""Rows on the reasoning that is watched: what it rests on, and what the detectors say of it."""

from grafana_foundation_sdk.builders import stat, timeseries
from panels import (
    BY,
    ENGINE,
    GREEN_BELOW_1,
    MONITOR,
    NAME,
    OURS,
    SENTENCES,
    TOKENS,
    Query,
    curve,
    number,
    over,
    over_sum,
    quantile,
    rate,
)


def anchored() -> list[timeseries.Panel]:
    """Row 2: what the output rests on."""
    mass = "stream_monitor_anchor_mass_total"
    return [
        curve(
            "Anchors by role",
            "percentunit",
            "Of the attention on candidate anchors (sentences at least four back), the part on each role.",
            Query(over_sum(rate(mass, by="by (role)"), rate(mass, by="")), "{{role}}"),
            stacked=True,
            most=1,
        ),
        curve(
            "Attention on anchors",
            "percentunit",
            "Mean share of a sentence's whole attention that lies on candidate anchors; the rest is near by, on the "
            "first token, or not observed.",
            Query(over(rate(mass), SENTENCES)),
        ),
        curve(
            "Not observed",
            "percentunit",
            "Share of attention in blocks that were not kept, as estimated; mean of a sentence. Median and highest "
            "tenth.",
            Query(quantile(0.5, "stream_monitor_unobserved_share_ratio"), f"p50 {NAME}"),
            Query(quantile(0.9, "stream_monitor_unobserved_share_ratio"), f"p90 {NAME}", exemplars=True),
            most=1,
            alert="StreamMonitorAuditRecallLow",
        ),
        curve(
            "Requests",
            "none",
            "Running in the monitor's eyes, in vLLM's, and waiting there.",
            Query(f"sum {BY} (stream_monitor_requests_active{{{OURS}}})", f"seen {NAME}"),
            Query(f"sum {BY} (vllm:num_requests_running{{{ENGINE}}})", f"running {NAME}"),
            Query(f"sum {BY} (vllm:num_requests_waiting{{{ENGINE}}})", f"waiting {NAME}"),
        ),
        curve(
            "Sentences and tokens",
            "cps",
            "Sentences of the output closed and scored, and tokens that vLLM generates.",
            Query(SENTENCES, f"sentences {NAME}"),
            Query(TOKENS, f"tokens {NAME}"),
        ),
        curve(
            "Requests started and finished",
            "cps",
            "As the monitor sees them.",
            Query(rate("stream_monitor_requests_started_total", by=""), "started"),
            Query(rate("stream_monitor_requests_finished_total", by=""), "finished"),
        ),
    ]


def shifts() -> list[timeseries.Panel | stat.Panel]:
    """Row 3: what the detectors say, and how far they may be believed."""
    events, verdicts = "stream_monitor_events_total", "stream_monitor_verdicts_total"
    return [
        curve(
            "Findings",
            "cpm",
            "Per minute, by kind. A finding is a signal, not a verdict.",
            Query(f"60 * {rate(events, by='by (kind)')}", "{{kind}}", exemplars=True),
            stacked=True,
            alert="StreamMonitorEventRateAbnormal",
        ),
        curve(
            "Findings per 1,000 sentences",
            "none",
            "By kind; does not move with traffic.",
            Query(f"1000 * {over_sum(rate(events, by='by (kind)'), f'sum({SENTENCES})')}", "{{kind}}"),
            alert="StreamMonitorEventRateAbnormal",
        ),
        curve(
            "The last hour against the day before",
            "none",
            "Findings of the last hour, and those that its sentences would have raised at the rate of the day before.",
            Query(f"sum by (kind) (engine_kind:stream_monitor_events:increase1h{{{ENGINE}}})", "{{kind}}"),
            Query(f"sum by (kind) (engine_kind:stream_monitor_events_usual:increase1h{{{ENGINE}}})", "usual {{kind}}"),
            alert="StreamMonitorEventRateAbnormal",
        ),
        curve(
            "Abstentions",
            "percentunit",
            "Of the sentences scored, those that a detector says nothing of: too few captured rows, or nothing to look "
            "at.",
            Query(
                over(
                    rate(verdicts, f'{OURS}, verdict="insufficient"', "by (kind)"),
                    rate(verdicts, by="by (kind)"),
                ),
                "{{kind}}",
            ),
            most=1,
        ),
        number(
            "Untrusted anchors, last 15 min",
            "none",
            "Times that reasoning came to rest most on text labelled untrusted.",
            Query(f'sum(increase({events}{{{OURS}, kind="UNTRUSTED_ANCHOR"}}[15m]))', "untrusted"),
            alert="StreamMonitorUntrustedAnchor",
            **GREEN_BELOW_1,
        ),
        number(
            "Age of the oldest profile",
            "s",
            "Time since the oldest calibration profile was made.",
            Query(
                f'time() - min(stream_monitor_profile_timestamp_seconds{{{MONITOR}, model_name=~"$model_name"}})', "age"
            ),
            steps=((None, "green"), (30 * 86400.0, "red")),
            alert="StreamMonitorProfileStale",
            empty="No profile",
        ),
        number(
            "Requests without a profile",
            "percentunit",
            "Of the requests that start, those whose findings have no known rate of false alarms.",
            Query(
                over(
                    rate("stream_monitor_uncalibrated_requests_total", f'{MONITOR}, model_name=~"$model_name"', ""),
                    rate("stream_monitor_requests_started_total", by=""),
                ),
                "uncalibrated",
            ),
            steps=((None, "green"), (0.01, "red")),
            alert="StreamMonitorProfileMissing",
            empty="None",
        ),
    ]
