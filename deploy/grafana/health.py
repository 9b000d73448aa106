"""Rows on the monitor itself: whether it sees, and what it costs."""

from grafana_foundation_sdk.builders import stat, table, timeseries
from panels import (
    BY,
    ENGINE,
    GREEN_BELOW_1,
    MONITOR,
    NAME,
    OURS,
    SOURCE,
    TOKENS,
    Query,
    curve,
    number,
    over,
    quantile,
    rate,
    targets,
)

CAPTURED = rate("stream_monitor_rows_total", f'{OURS}, outcome="captured"')
NOT_WANTED = (
    f'sum {BY} (rate(stream_monitor_rows_total{{{OURS}, outcome="sampled_out"}}[$__rate_interval])'
    f' or rate(stream_monitor_rows_total{{{OURS}, reason="client_disabled"}}[$__rate_interval])'
    f' or rate(stream_monitor_rows_total{{{OURS}, outcome="discarded",'
    ' reason=~"recomputed|stale|repeated|past_end|readded|deleted"}[$__rate_interval]))'
)
WANTED = f"({rate('stream_monitor_rows_expected_total')} - {NOT_WANTED})"
"""As `engine:stream_monitor_rows_wanted:rate5m` in deploy/prometheus/recording.yaml."""


GREEN_ABOVE_99 = {"steps": ((None, "red"), (0.99, "green"))}


def seeing() -> list[stat.Panel | timeseries.Panel]:
    """Row 1: whether what the rest shows can be believed."""
    state = f"(sum({TOKENS}) > bool 0) + ((sum({TOKENS}) > bool 0) * (sum({CAPTURED}) == bool 0))"
    return [
        number(
            "State",
            "none",
            "Seeing: vLLM generates and rows arrive. Blind: it generates and none does. No traffic: it does not.",
            Query(state, "state"),
            names={"0": ("No traffic", "blue"), "1": ("Seeing", "green"), "2": ("Blind", "red")},
            alert="StreamMonitorBlind",
            empty="No monitor",
        ),
        number(
            "Coverage",
            "percentunit",
            "Of the rows that should be seen now, the part that is. Objective: 99%.",
            Query(over(f"sum({CAPTURED})", f"sum({WANTED})"), "coverage"),
            alert="StreamMonitorCoverageLow",
            **GREEN_ABOVE_99,
        ),
        number(
            "Windows that missed",
            "percentunit",
            "Of the five-minute windows in the range shown, the part with coverage below 99%. Objective: at most 0.5%.",
            Query(f"avg(avg_over_time(engine:stream_monitor_coverage_missed:bool{{{ENGINE}}}[$__range]))", "missed"),
            steps=((None, "green"), (0.005, "red")),
            alert="StreamMonitorCoverageLow",
        ),
        number(
            "Engines watched / serving",
            "none",
            "Engines with an open stream to a monitor, and engines of which vLLM's metrics are scraped.",
            Query(f"sum(stream_monitor_engines_connected{{{OURS}}})", "watched"),
            Query(f"count(vllm:num_requests_running{{{ENGINE}}})", "serving"),
            alert="StreamMonitorEngineUnwatched",
            empty="No engine",
        ),
        number(
            "Events behind their sentence",
            "s",
            "99% of the events are published this soon after the step that closed their sentence. Objective: 2 s.",
            Query(
                "histogram_quantile(0.99, " + rate("stream_monitor_event_delay_seconds_bucket", by="by (le)") + ")",
                "p99",
            ),
            steps=((None, "green"), (2.0, "red")),
            alert="StreamMonitorEventsLate",
        ),
        number(
            "Faulty ranks",
            "none",
            "Ranks that serve on with capture turned off by a fault.",
            Query(f"sum(stream_monitor_ranks_faulty{{{OURS}}})", "faulty"),
            alert="StreamMonitorCaptureFaulty",
            empty="No engine",
            **GREEN_BELOW_1,
        ),
        curve(
            "Coverage by engine",
            "percentunit",
            "Captured rows over rows that should be seen.",
            Query(over(CAPTURED, WANTED)),
            most=1,
            alert="StreamMonitorCoverageLow",
        ),
        curve(
            "What becomes of rows",
            "cps",
            "Rows x layers x query heads per second by outcome; those left out by the stride are not shown.",
            Query(rate("stream_monitor_rows_total", f'{OURS}, outcome!="sampled_out"', "by (outcome)"), "{{outcome}}"),
            stacked=True,
        ),
        curve(
            "Rows not seen, by reason",
            "cps",
            "Dropped, raced and refused rows per second.",
            Query(
                rate("stream_monitor_rows_total", f'{OURS}, outcome=~"dropped|raced|refused"', "by (outcome, reason)")
                + " > 0",
                "{{outcome}} {{reason}}",
            ),
            stacked=True,
            alert="StreamMonitorRowsDropped",
        ),
        curve(
            "How full queues are",
            "percentunit",
            "Size over capacity of the fullest rank: estimator, ring, publisher's backlog, merge; and of subscribers.",
            Query(
                f"max by (queue) (stream_monitor_queue_size{{{OURS}}} / (stream_monitor_queue_capacity{{{OURS}}} > 0))",
                "{{queue}}",
            ),
            Query(
                f"max(stream_monitor_subscriber_queue_events{{{MONITOR}}}"
                f" / (stream_monitor_subscriber_queue_limit_events{{{MONITOR}}} > 0))",
                "subscriber",
            ),
            most=1,
            alert="StreamMonitorQueueFilling",
        ),
        curve(
            "Delay",
            "s",
            "From the engine's step until the monitor took it in (step), and until the events of a sentence that it "
            "closed were published (event).",
            Query(quantile(0.5, "stream_monitor_event_delay_seconds"), f"event p50 {NAME}"),
            Query(quantile(0.99, "stream_monitor_event_delay_seconds"), f"event p99 {NAME}", exemplars=True),
            Query(quantile(0.99, "stream_monitor_step_delay_seconds"), f"step p99 {NAME}", exemplars=True),
            alert="StreamMonitorEventsLate",
        ),
        curve(
            "Messages",
            "mps",
            "Sent by publishers' own count, and what became of them here. Sent and received part where messages are "
            "sent again.",
            Query(rate("stream_monitor_messages_sent_total", by=""), "sent"),
            Query(rate("stream_monitor_messages_total", MONITOR, "by (outcome, reason)"), "{{outcome}} {{reason}}"),
            alert="StreamMonitorMessagesRefused",
        ),
        curve(
            "Audit recall",
            "percentunit",
            "Of rows recomputed exactly: attention on the blocks that the search kept over that on the best ones. "
            "Mean, and the lowest twentieth.",
            Query(
                over(rate("stream_monitor_audit_recall_ratio_sum"), rate("stream_monitor_audit_recall_ratio_count")),
                f"mean {NAME}",
            ),
            Query(quantile(0.05, "stream_monitor_audit_recall_ratio"), f"p5 {NAME}"),
            most=1,
            alert="StreamMonitorAuditRecallLow",
        ),
        curve(
            "Steps",
            "ops",
            "Engine steps with rows: complete; partial where ranks were missing; what ranks sent late of them.",
            Query(rate("stream_monitor_steps_total", by="by (result)"), "{{result}}"),
            stacked=True,
        ),
        curve(
            "Requests refused, arguments refused, messages lost",
            "cps",
            "Requests that are not captured, entries of vllm_xargs that were not honoured, and gaps in sequences.",
            Query(rate("stream_monitor_requests_refused_total", by="by (reason)") + " > 0", "request: {{reason}}"),
            Query(
                rate("stream_monitor_request_arguments_refused_total", by="by (argument, reason)") + " > 0",
                "{{argument}}: {{reason}}",
            ),
            Query(rate("stream_monitor_messages_lost_total", by="") + " > 0", "messages lost"),
        ),
    ]


def cost() -> list[timeseries.Panel | table.Panel]:
    """Row 4: what it takes from the engine, and what the monitor needs itself."""
    seconds = rate("stream_monitor_estimate_seconds_total")
    versions = (
        table.Panel()
        .title("What runs")
        .description("Versions of vLLM and of the plug-in, and the search, of connected engines.")
        .datasource(SOURCE)
        .unit("none")
        .no_value("No engine")
        .span(8)
        .height(8)
    )
    info = (
        f"count by (model_name, engine, vllm_version, plugin_version, strategy) (stream_monitor_engine_info{{{OURS}}})"
    )
    targets(versions, (Query(info, ""),), instant=True)
    return [
        curve(
            "Searching",
            "percentunit",
            "Part of one CPU that the estimator thread is busy.",
            Query(seconds),
        ),
        curve(
            "Searching, per generated token",
            "s",
            "Estimator time over the tokens that vLLM generates. Beside decoding, not added to it.",
            Query(over(seconds, TOKENS)),
        ),
        curve(
            "One search",
            "s",
            "Mean time of a search: all sampled rows, layers and heads of a step.",
            Query(over(seconds, rate("stream_monitor_estimates_total"))),
        ),
        curve(
            "Bytes",
            "Bps",
            "Read from the KV cache, written to the ring, received by the monitor.",
            Query(rate("stream_monitor_estimate_read_bytes_total"), f"read {NAME}"),
            Query(rate("stream_monitor_estimate_written_bytes_total"), f"written {NAME}"),
            Query(rate("stream_monitor_message_bytes_total", MONITOR, ""), "received"),
        ),
        curve(
            "Time between tokens",
            "s",
            "vLLM's own figure, mean: what users would feel.",
            Query(
                over(
                    rate("vllm:inter_token_latency_seconds_sum", ENGINE),
                    rate("vllm:inter_token_latency_seconds_count", ENGINE),
                )
            ),
        ),
        curve(
            "KV cache",
            "percentunit",
            "How full vLLM's cache is.",
            Query(f"max {BY} (vllm:kv_cache_usage_perc{{{ENGINE}}})", f"used {NAME}"),
            most=1,
        ),
        curve(
            "Memory",
            "bytes",
            "Block summaries in the engine, traces in the monitor and their limit, and the monitor's process.",
            Query(f"sum {BY} (stream_monitor_block_summaries_bytes{{{OURS}}})", f"summaries {NAME}"),
            Query(f"sum(stream_monitor_traces_bytes{{{MONITOR}}})", "traces"),
            Query(f"sum(stream_monitor_traces_limit_bytes{{{MONITOR}}})", "traces, limit"),
            Query(f"sum(process_resident_memory_bytes{{{MONITOR}}})", "process"),
        ),
        curve(
            "KV cache given up",
            "none",
            "Tokens that the cache would hold more without block summaries.",
            Query(f"sum {BY} (stream_monitor_kv_cache_tokens_lost{{{OURS}}})"),
        ),
        curve(
            "The monitor's CPU",
            "percentunit",
            "Part of one CPU.",
            Query(rate("process_cpu_seconds_total", MONITOR, "by (instance)"), "{{instance}}"),
        ),
        curve(
            "Traces and subscribers",
            "none",
            "Traces held by state, subscriptions open, traces that had to make room per minute.",
            Query(f"sum by (state) (stream_monitor_traces{{{MONITOR}}})", "{{state}}"),
            Query(f"sum(stream_monitor_subscribers{{{MONITOR}}})", "subscribers"),
            Query(f"60 * {rate('stream_monitor_traces_evicted_total', MONITOR, 'by (limit)')}", "evicted: {{limit}}"),
        ),
        curve(
            "Lost to subscribers, dropped sentences, missing tokens",
            "cps",
            "Events lost to slow subscribers; sentences beyond max_sentences; tokens that were never reported.",
            Query(rate("stream_monitor_subscriber_events_lost_total", MONITOR, ""), "events lost"),
            Query(rate("stream_monitor_sentences_dropped_total", by=""), "sentences dropped"),
            Query(rate("stream_monitor_tokens_missing_total", by=""), "tokens missing"),
            alert="StreamMonitorEventsLost",
        ),
        curve(
            "The store",
            "none",
            "Findings and traces that wait to be written; written, and lost or removed, per minute, by why.",
            Query(f"sum by (record) (stream_monitor_store_queue_records{{{MONITOR}}})", "{{record}} waiting"),
            Query(f"60 * {rate('stream_monitor_store_written_total', MONITOR, 'by (record)')}", "{{record}} written"),
            Query(
                f"60 * sum by (record, reason) (rate(stream_monitor_store_removed_total{{{MONITOR}}}[$__rate_interval])"
                f" or rate(stream_monitor_store_lost_total{{{MONITOR}}}[$__rate_interval])) > 0",
                "{{record}} gone: {{reason}}",
            ),
            alert="StreamMonitorStoreFailing",
        ),
        curve(
            "How full the store is",
            "percentunit",
            "Bytes in use over the limit; beyond it the oldest go.",
            Query(
                f"max(stream_monitor_store_bytes{{{MONITOR}}} / (stream_monitor_store_limit_bytes{{{MONITOR}}} > 0))",
                "used",
            ),
            most=1,
        ),
        number(
            "Certificate, time left",
            "s",
            "Until the certificate that the monitor shows, or the last CA by which it knows clients, expires.",
            Query(f"min(stream_monitor_tls_expiry_timestamp_seconds{{{MONITOR}}}) - time()", "left"),
            steps=((None, "red"), (7 * 86400.0, "green")),
            alert="StreamMonitorCertificateExpiring",
            empty="No TLS",
        ),
        versions,
    ]
