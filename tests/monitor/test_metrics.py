"""What Prometheus gets: checked by promtool, bounded in series, with request ids as exemplars alone."""

import subprocess
import time
from collections import Counter
from collections.abc import Callable

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families

from stream_monitor.anchors.panel import Kind
from stream_monitor.anchors.verdict import Verdict
from stream_monitor.monitor import outcomes
from stream_monitor.monitor.metric_table import ENGINE, TABLE
from stream_monitor.monitor.metrics import EXEMPLAR_CHARACTERS, RESULTS, ROLES, exemplar
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2
from tests.monitor.conftest import Running, Stream
from tests.monitor.synthetic import SENTENCE, Engine, Look, engine, finished, started, tokens

MAX_SERIES = 300
"""Of one engine, every label value active."""


def ledger_with_everything() -> summary_pb2.Ledger:
    """Every outcome and reason there is, and as many again that nobody knows."""
    counts = [
        summary_pb2.RowCount(outcome=outcome, reason=reason, count=1)
        for outcome, (_, reasons) in outcomes.ROWS.items()
        for reason in reasons
    ]
    counts += [summary_pb2.RowCount(outcome="refused", reason=f"new_{index}", count=1) for index in range(20)]
    counts.append(summary_pb2.RowCount(outcome="expected", count=len(counts)))
    arguments = {f"{name}:{reason}": 1 for name, reason in outcomes.ARGUMENTS} | {"more:reasons": 1}
    return summary_pb2.Ledger(token_rows=counts, chunk_rows=counts, refused_arguments=arguments)


def every_label_value(monitor: Running) -> Stream:
    """An engine that shows every value of every label, as long as its stream is held."""
    stream, rank = Stream(monitor), Engine()
    stream.send(rank.summary(ledger=ledger_with_everything()))
    labels = ("tiny", "0")
    metrics = monitor.server.metrics
    for kind in Kind:
        for severity in monitor_pb2.Severity.keys()[1:]:
            metrics.events.labels(*labels, kind.name, severity.removeprefix("SEVERITY_").lower()).inc()
        for verdict in Verdict:
            metrics.verdicts.labels(*labels, kind.value, verdict.value).inc()
    for role in ROLES.values():
        metrics.anchor_mass.labels(*labels, role).inc()
    for result in RESULTS:
        metrics.steps.labels(*labels, result).inc()
    return stream


def test_an_engine_has_at_most_300_series(monitor: Running) -> None:
    _held = every_label_value(monitor)
    per_engine: Counter[str] = Counter()
    for family in text_string_to_metric_families(monitor.http("/metrics").text):
        for sample in family.samples:
            if "engine" in sample.labels:
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0")
                per_engine[family.name] += 1
    assert len(per_engine) == sum(set(ENGINE) <= set(definition.labels) for definition in TABLE)
    assert per_engine["stream_monitor_rows"] == 2 * sum(len(reasons) for _, reasons in outcomes.ROWS.values())
    assert sum(per_engine.values()) <= MAX_SERIES
    # What nobody knows is not lost: it is counted as "other".
    assert monitor.metric("stream_monitor_rows_total", reason="other", outcome="refused") == 2 * 21
    assert monitor.metric("stream_monitor_rows_total") == monitor.metric("stream_monitor_rows_expected_total")


def test_promtool_finds_nothing_to_say(monitor: Running) -> None:
    _held = every_label_value(monitor)
    monitor.publish(Engine().request("r", [4] * 20))
    text = monitor.http("/metrics").text
    assert text.count("# HELP stream_monitor_") == text.count("# TYPE stream_monitor_") == len(TABLE)
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_series_stand_at_0_before_anything_happens(monitor: Running) -> None:
    stream, rank = Stream(monitor), Engine()
    stream.send(rank.summary(ledger=summary_pb2.Ledger()))
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(monitor.http("/metrics").text)
        for sample in family.samples
    }
    for kind in Kind:
        assert samples["stream_monitor_events_total", "0", kind.name, "tiny", "warning"] == 0
    assert samples["stream_monitor_rows_total", "0", "dropped", "ring_full", "tiny", "token"] == 0
    assert samples["stream_monitor_messages_total", "invalid", "oversized"] == 0
    assert samples["stream_monitor_event_delay_seconds_count", "0", "tiny"] == 0
    assert samples["stream_monitor_engines_connected", "0", "tiny"] == 1


def test_request_ids_are_exemplars_alone(monitor: Running) -> None:
    rank = Engine()
    long_id = "chatcmpl-" + "x" * EXEMPLAR_CHARACTERS + "-aee6d49e"
    now = time.time_ns()
    for name in (long_id, "chatcmpl-my-req-1-aee6d49e"):
        summaries = rank.request(name, [4] * 14 + [30] * 8)
        for summary in summaries:
            summary.wall_time_ns = now
        monitor.publish(summaries)
    text = monitor.http("/metrics", "application/openmetrics-text; version=1.0.0").text
    assert "x" * 20 not in text
    named: dict[str, set[str]] = {}
    for family in parse_open_metrics(text):
        for sample in family.samples:
            assert "my-req-1" not in str(sample.labels)
            if sample.exemplar:
                assert sum(len(key) + len(value) for key, value in sample.exemplar.labels.items()) <= 128
                named.setdefault(family.name, set()).add(sample.exemplar.labels["request_id"])
    with_exemplars = {d.name.removesuffix("_total") for d in TABLE if d.exemplars}
    assert named == {name: {"chatcmpl-my-req-1"} for name in with_exemplars}


def test_a_deleted_request_leaves_no_exemplar(monitor: Running) -> None:
    rank = Engine()
    for name in ("chatcmpl-kept-aee6d49e", "chatcmpl-gone-bee6d49e"):
        summaries = rank.request(name, [4] * 14 + [30] * 8)
        for summary in summaries:
            summary.wall_time_ns = time.time_ns()
        monitor.publish(summaries)
    accept = "application/openmetrics-text; version=1.0.0"
    assert monitor.http("/metrics", accept).text.count("gone") >= 4
    monitor.publish(rank.request("chatcmpl-kept-cee6d49e", [4] * 3))
    monitor.api.DeleteRequest(monitor_pb2.DeleteRequestRequest(request_id="gone"))
    text = monitor.http("/metrics", accept).text
    assert "gone" not in text
    assert "chatcmpl-kept" in text


def test_an_exemplar_of_128_characters_is_the_longest() -> None:
    longest = EXEMPLAR_CHARACTERS - len("request_id")
    assert exemplar("a" * longest) == {"request_id": "a" * longest}
    assert exemplar("a" * (longest + 1)) is None


def test_anchor_mass_is_counted_by_role(monitor: Running) -> None:
    # Tokens 0 to 23 of the prompt are the system's, 24 to 47 the user's.
    monitor.publish(Engine().request("r", [4] * 6 + [30] * 2))
    mass = {role: monitor.metric("stream_monitor_anchor_mass_total", role=role) for role in ROLES.values()}
    assert abs(mass["system"] - 6 * 0.5) < 0.01
    assert abs(mass["user"] - 2 * 0.5) < 0.01
    assert sum(mass.values()) == mass["system"] + mass["user"]


def test_the_delay_of_an_event_begins_where_its_sentence_closed(monitor: Running) -> None:
    rank, start = Engine(), time.time_ns() - 100 * 10**9
    stamp = start
    summaries = [rank.summary(started=[started("r")], wall_time_ns=start)]
    for index in range(3):
        for offset in (0, 4):
            stamp += 10**9
            at = 48 + 6 * index + offset
            summaries.append(rank.summary([Look("r", at, 4)], wall_time_ns=stamp))
        stamp += 10**9
        summaries.append(rank.summary(tokens=[tokens("r", 48 + 6 * index, SENTENCE)], wall_time_ns=stamp))
    summaries.append(rank.summary(finished=[finished("r", 66)], wall_time_ns=stamp + 10**9))
    monitor.publish(summaries)
    # A sentence closes with the first token of the next one, or with the request: after 6, 9 and 10 seconds.
    assert monitor.metric("stream_monitor_event_delay_seconds_count") == 3
    mean = monitor.metric("stream_monitor_event_delay_seconds_sum") / 3
    assert abs(mean - (time.time_ns() - start) / 1e9 + 25 / 3) < 1


def test_queues_are_those_of_the_fullest_rank(monitor: Running) -> None:
    instance = engine().instance
    streams = []
    for rank, size in ((0, 3), (1, 7)):
        info = engine(
            instance, tensor_parallel_rank=rank, tensor_parallel_size=2, heads=(0, 1), first_query_head=2 * rank
        )
        streams.append(Stream(monitor))
        queue = summary_pb2.QueueState(name="ring", size=size, capacity=10)
        strange = summary_pb2.QueueState(name="strange", size=1, capacity=1)
        streams[-1].send(Engine(info).summary(ledger=summary_pb2.Ledger(queues=[queue, strange], sent=size)))
    assert monitor.metric("stream_monitor_queue_size", queue="ring") == 7
    assert monitor.metric("stream_monitor_queue_capacity", queue="ring") == 10
    assert monitor.metric("stream_monitor_queue_capacity", queue="merge") > 0
    assert monitor.metric("stream_monitor_queue_size", queue="strange") == 0
    assert monitor.metric("stream_monitor_messages_sent_total") == 10
    assert (monitor.metric("stream_monitor_ranks_connected"), monitor.metric("stream_monitor_engines_connected")) == (
        2,
        1,
    )


def test_counts_of_a_retired_rank_stay(run: Callable[..., Running]) -> None:
    monitor = run(max_engines=1)
    for _ in range(3):
        monitor.publish(
            [Engine(step=4).summary(ledger=summary_pb2.Ledger(estimates=4, sent=5, key_bytes=6, device_waits=2))]
        )
    assert monitor.metric("stream_monitor_estimates_total") == 12
    assert monitor.metric("stream_monitor_messages_sent_total") == 15
    assert monitor.metric("stream_monitor_estimate_read_bytes_total") == 18
    assert monitor.metric("stream_monitor_device_waits_total") == 6


def test_active_requests_are_those_of_connected_engines(monitor: Running) -> None:
    stream, rank = Stream(monitor), Engine()
    stream.send(rank.summary(started=[started("a"), started("b")]))
    stream.send(rank.summary(finished=[finished("a", 48)]))
    monitor.publish([Engine().summary(started=[started("of an engine that is gone")])])
    assert monitor.metric("stream_monitor_requests_active") == 1
