"""Panels and expressions, as these dashboards make them.

Rates go over `$__rate_interval`, nothing is divided by what may be 0, and all is filtered by the variables. Metrics of
the monitor are filtered by `$job`, too; vLLM's come from another job and are joined by model and engine.
"""

import json
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
OURS = 'job=~"$job", model_name=~"$model_name", engine=~"$engine"'
MONITOR = 'job=~"$job"'
ENGINE = 'model_name=~"$model_name", engine=~"$engine"'
BY = "by (model_name, engine)"
NAME = "{{model_name}} {{engine}}"


def rate(metric: str, labels: str = OURS, by: str = BY) -> str:
    """Per second, summed."""
    return f"sum {by} (rate({metric}{{{labels}}}[$__rate_interval]))"


def over(numerator: str, denominator: str) -> str:
    """A ratio of like-labelled series; absent where the denominator is 0."""
    return f"{numerator} / ({denominator} > 0)"


def over_sum(numerator: str, denominator: str) -> str:
    """A ratio of series to one series without labels; absent where that is 0."""
    return f"{numerator} / on () group_left () ({denominator} > 0)"


def quantile(q: float, histogram: str) -> str:
    """Of a histogram, by engine."""
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', by='by (model_name, engine, le)')})"


SENTENCES = rate("stream_monitor_sentences_total")
TOKENS = rate("vllm:generation_tokens_total", ENGINE)
GREEN_BELOW_1 = {"steps": ((None, "green"), (1.0, "red"))}


@dataclass(frozen=True)
class Query:
    """An expression and how its series are called."""

    expr: str
    legend: str = NAME
    exemplars: bool = False


def targets(panel: timeseries.Panel | stat.Panel | table.Panel, queries: tuple[Query, ...], instant: bool) -> None:
    """Add queries A, B, ... to a panel."""
    for index, query in enumerate(queries):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + index))
        if instant:
            target.instant().format(
                prometheus_models.PromQueryFormat.TABLE
                if isinstance(panel, table.Panel)
                else prometheus_models.PromQueryFormat.TIME_SERIES
            )
        else:
            target.range()
        panel.with_target(target.exemplar(query.exemplars))


def curve(
    title: str,
    unit: str,
    description: str,
    *queries: Query,
    stacked: bool = False,
    most: float | None = None,
    alert: str = "",
    width: int = 8,
) -> timeseries.Panel:
    """A panel over time. `alert`: the one whose heading in the runbook it links to."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .no_value("No traffic")
        .span(width)
        .height(8)
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
        )
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL)).fill_opacity(40)
    if most is not None:
        panel.max(most)
    if alert:
        panel.links([runbook(alert)])
    targets(panel, queries, instant=False)
    return panel


def number(
    title: str,
    unit: str,
    description: str,
    *queries: Query,
    steps: tuple[tuple[float | None, str], ...] = ((None, "blue"),),
    names: dict[str, tuple[str, str]] | None = None,
    alert: str = "",
    empty: str = "No traffic",
) -> stat.Panel:
    """One figure. `steps`: colour from a value on. `names`: value to text and colour."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .no_value(empty)
        .span(4)
        .height(4)
        .color_mode(common_models.BigValueColorMode.BACKGROUND)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .thresholds(
            dashboard.ThresholdsConfig()
            .mode(models.ThresholdsMode.ABSOLUTE)
            .steps([models.Threshold(value=value, color=color) for value, color in steps])
        )
    )
    if names:
        options = {
            value: models.ValueMappingResult(text=text, color=color, index=index)
            for index, (value, (text, color)) in enumerate(names.items())
        }
        panel.mappings([models.ValueMap(options=options)])
    if alert:
        panel.links([runbook(alert)])
    targets(panel, queries, instant=True)
    return panel


def runbook(alert: str) -> dashboard.DashboardLink:
    """To the heading of an alert."""
    return (
        dashboard.DashboardLink(f"Runbook: {alert}")
        .type(models.DashboardLinkType.LINK)
        .url(f"${{runbook}}#{alert.lower()}")
        .target_blank(True)
    )


def variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A choice of label values, several or all."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def plain(board: dashboard.Dashboard) -> dict:
    """A dashboard as plain values, its panels numbered."""
    content: dict = json.loads(json.dumps(board.build(), cls=JSONEncoder))
    for index, panel in enumerate(content["panels"], 1):
        panel["id"] = index
    return content
