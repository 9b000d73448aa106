"""Prints metrics.md from the table of metrics: `make docs` writes the file, a test compares the two."""

from stream_monitor.monitor import outcomes
from stream_monitor.monitor.fleet.metric_table import FLEET_TABLE
from stream_monitor.monitor.metric_table import TABLE, Definition

HEAD = """# Metrics

Written by `make docs` from `stream_monitor/monitor/metric_table.py`, `stream_monitor/monitor/outcomes.py` and
`stream_monitor/monitor/fleet/metric_table.py`. Tests compare this page with what a running monitor and a process of a
fleet show.

The monitor serves them at `/metrics` of its HTTP address, in the Prometheus text format or OpenMetrics, whichever is
asked for. `model_name` and `engine` are the labels of vLLM's own metrics, so that the two can be joined. If more than
1,024 pairs of model and engine are seen, later ones share the labels `other`. An engine has at most 300 series.

A request id is never a label. Where it says *exemplars*, OpenMetrics samples carry the id of one request as an exemplar
(`request_id`), which a Prometheus started with `--enable-feature=exemplar-storage` keeps and Grafana shows: from a
strange sample to `stream-monitor explain REQUEST_ID`. Ids that do not fit the 128 characters of an exemplar are left
out.

[runbook.md](runbook.md) says which of these raise an alert, and what to do then."""

ACCOUNT = """\
One **row** is the last query token of one request in one engine step. It is counted once for each watched layer and
each watched query head, on every rank: 1 row, 4 layers and 8 heads make 32. `phase` is `token` for rows from which a
token was sampled and `chunk` for rows that end a chunk of a prompt, and those inside one that `prompt_stride` asks for.
Once nothing is in flight, the outcomes add up to what was expected:

    expected = captured + sampled_out + dropped + raced + refused + discarded"""

COVERAGE = """\
`sum(stream_monitor_rows_total)` staying below `sum(stream_monitor_rows_expected_total)` while the engine is idle
means that something was lost without a name: a fault of Stream Monitor. **Coverage** is the share of the rows that
should be seen and are, `engine:stream_monitor_coverage:ratio_rate5m` in `deploy/prometheus/`: rows in use, over all
expected ones without those left out by the stride or at a client's allowed wish and without those that were replaced
or deleted ({replaced})."""

MESSAGES = "Outcomes of messages:"

FLEET = """\
## A process of the fleet

What `stream-monitor fleet` shows ([fleet.md](fleet.md)), and nothing else: no metric of a monitor, so that sums over
both count nothing twice."""

TAIL = """Beside these stand `process_*`, the usual figures of the process."""


def main() -> None:
    """The whole page."""
    print(HEAD)
    for section in dict.fromkeys(definition.section for definition in TABLE):
        print(f"\n## {section}\n")
        if section == "The account of rows":
            print(f"{ACCOUNT}\n")
        print("| metric | type | labels | meaning |\n| --- | --- | --- | --- |")
        for definition in TABLE:
            if definition.section == section:
                print(line(definition))
        if section == "The account of rows":
            print(f"\n{outcome_table(outcomes.ROWS)}\n")
            print(COVERAGE.format(replaced=", ".join(f"`{reason}`" for reason in outcomes.REPLACED)))
        if section == "Messages, queues and ranks":
            print(f"\n{MESSAGES}\n\n{outcome_table(outcomes.MESSAGES)}")
    print(f"\n{FLEET}\n\n| metric | type | labels | meaning |\n| --- | --- | --- | --- |")
    for definition in FLEET_TABLE:
        print(line(definition))
    print(f"\n{TAIL}")


def line(definition: Definition) -> str:
    """One metric's row. An info metric is a gauge of 1 in the text format."""
    kind = "gauge" if definition.kind == "info" else definition.kind
    labels = ", ".join(f"`{label}`" for label in definition.labels)
    text = definition.text + (" *Exemplars.*" if definition.exemplars else "")
    return f"| `{definition.name}` | {kind} | {labels} | {text} |"


def outcome_table(found: dict[str, tuple[str, dict[str, str]]]) -> str:
    """Outcomes with all their reasons."""
    lines = ["| outcome | meaning | reasons |", "| --- | --- | --- |"]
    for outcome, (meaning, reasons) in found.items():
        why = "; ".join(f"`{reason}`: {text}" for reason, text in reasons.items() if reason)
        lines.append(f"| `{outcome}` | {meaning} | {why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
