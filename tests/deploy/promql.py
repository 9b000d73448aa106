"""What expressions name, and what there is to be named."""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from stream_monitor.monitor.metric_table import TABLE, Definition

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = [ROOT / "deploy/prometheus/recording.yaml", ROOT / "deploy/prometheus/alerts.yaml"]
VLLM_EXPOSITION = Path(__file__).with_name("vllm_metrics.txt")
"""Recorded from a real server, as its first lines say."""

_NAME = re.compile(r"[a-zA-Z_]\w*:\w+(?::\w+)*|(?:stream_monitor|process)_\w+")


def rules(kind: str) -> list[dict]:
    """All rules of a kind, `alert` or `record`, in the order of the files."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def metrics_in(expression: str) -> set[str]:
    """Names of series that an expression asks for: ours, recorded ones, vLLM's and the process's."""
    without_strings = re.sub(r'"[^"]*"', "", expression)
    return set(_NAME.findall(without_strings))


def known_metrics() -> set[str]:
    """Names of all series of a monitor, of a vLLM server, and of our recording rules."""
    process = {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"}
    recorded = {rule["record"] for rule in rules("record")}
    return series(TABLE) | process | recorded | vllm_metrics()


def series(table: Iterable[Definition]) -> set[str]:
    """Names of all series of these metrics."""
    return {
        f"{definition.name}{suffix}"
        for definition in table
        for suffix in (("_bucket", "_sum", "_count") if definition.kind == "histogram" else ("",))
    }


def vllm_metrics() -> set[str]:
    """Names of a vLLM server's series."""
    families = text_string_to_metric_families(VLLM_EXPOSITION.read_text())
    return {sample.name for family in families for sample in family.samples}
