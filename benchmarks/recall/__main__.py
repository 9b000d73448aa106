"""Recall against keys read: `beam` against its rivals on real queries and keys."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.attention import QUERY_ROWS, load_tokenizer, of_text
from benchmarks.recall.account import BUDGETS, margin, mean, one_setting, targets
from benchmarks.recall.frontier import at_budget
from benchmarks.recall.plot import plot
from benchmarks.recall.points import BEAM, DEFAULT, ORACLE, Case
from benchmarks.recall.race import measure
from benchmarks.report import Report, bootstrap, run
from benchmarks.texts import KINDS, token_ids

TOP_KS = (4, 8, 16)
TARGET_TOP_K = 8

WIDE_GROUP = 6
"""Query heads per KV head from which a model is measured on the longer contexts."""


def main(
    model: Annotated[list[Path] | None, typer.Option(help="Folder of a model; may be repeated.")] = None,
    text: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(KINDS)}; may be repeated.")] = None,
    traces: Annotated[Path | None, typer.Option(help="JSON lines of recorded reasoning; adds that text.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Context length; may be repeated.")] = None,
    top_k: Annotated[list[int], typer.Option(help="Blocks kept; may be repeated.")] = list(TOP_KS),  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of the texts and the resamples.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="16,000 and 32,000 tokens too (hours).")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the plots and all points.")] = Path("benchmarks/results"),
) -> None:
    """Recall of the heaviest key blocks against keys read, for `beam` and its rivals."""
    models = model or [Path(os.environ.get("MODEL_CACHE", ".cache/models")) / "smollm2"]
    kinds = text or [kind for kind in KINDS if kind != "reasoning" or traces]
    _check(models, kinds, traces, tokens)
    if not all(1 <= k <= 16 for k in top_k):
        raise typer.BadParameter(f"--top-k {max(top_k)}: from 1 to 16")
    cases = list(_cases(models, kinds, traces, tokens, top_k, seed, full))
    report = Report(
        benchmark="recall",
        config={
            "cases": [f"{case.model}/{case.tokens}/{case.text}" for case in cases],
            "top_k": top_k,
            "rows_per_case": QUERY_ROWS,
        },
        seed=seed,
        n=len(cases) * QUERY_ROWS,
    )
    for name in dict.fromkeys((case.model, case.tokens) for case in cases):
        _account([case for case in cases if (case.model, case.tokens) == name], top_k, report)
    _write(out, cases, top_k, report)
    report.finish()


def _write(out: Path, cases: Sequence[Case], top_ks: Sequence[int], report: Report) -> None:
    """The JSON line's content, every point measured, and the plots."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "recall.json").write_text(json.dumps(report.content(), indent=1) + "\n")
    (out / "recall-points.json").write_text(json.dumps([asdict(case) for case in cases]) + "\n")
    for top_k in top_ks:
        plot(cases, top_k, out / f"recall-k{top_k}.png")


def _check(models: Sequence[Path], kinds: Sequence[str], traces: Path | None, tokens: Sequence[int] | None) -> None:
    for model in models:
        if not (model / "config.json").is_file():
            raise typer.BadParameter(f"{model} is not the folder of a model; `make weights` fetches the default one")
    for kind in kinds:
        if kind not in KINDS:
            raise typer.BadParameter(f"text {kind!r}; valid: {', '.join(KINDS)}")
    if "reasoning" in kinds and traces is None:
        raise typer.BadParameter("the text reasoning needs --traces FILE")
    if traces is not None and not traces.is_file():
        raise typer.BadParameter(f"no file {traces}")
    if tokens and min(tokens) < 1024:
        raise typer.BadParameter(f"--tokens {min(tokens)}: at least 1024, below which nearly every block is kept")


def _lengths(model: Path, full: bool) -> list[int]:
    """Context lengths for a model, by what its config says of grouped queries."""
    config = json.loads((model / "config.json").read_text())
    config = config.get("text_config", config)
    heads = config["num_attention_heads"]
    if heads // config.get("num_key_value_heads", heads) < WIDE_GROUP:
        return [7_000]
    return [8_000, 16_000, 32_000] if full else [8_000]


def _cases(
    models: Sequence[Path],
    kinds: Sequence[str],
    traces: Path | None,
    tokens: Sequence[int] | None,
    top_ks: Sequence[int],
    seed: int,
    full: bool,
) -> Iterator[Case]:
    """All cases, as many at a time as there are cores: a search runs on one thread."""
    jobs = []
    for model in models:
        tokenizer = load_tokenizer(model)
        for wanted in tokens or _lengths(model, full):
            for kind in kinds:
                try:
                    ids = token_ids(tokenizer, kind, wanted, seed, traces)
                except ValueError as error:
                    raise typer.BadParameter(str(error)) from error
                of_text(model, ids)  # a forward pass, where the cache folder has none, takes every core
                jobs.append((model, kind, wanted, ids, top_ks))
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for case in pool.map(measure, *zip(*jobs, strict=True)):
            print(f"measured {case.model}, {case.text}, {case.length} tokens", flush=True)
            yield case


def _account(cases: Sequence[Case], top_ks: Sequence[int], report: Report) -> None:
    """Prints the tables of one model and length, and adds its figures to the report."""
    name = f"{cases[0].model}/{cases[0].tokens}"
    for top_k in top_ks:
        print(f"\n{name}, K = {top_k}: inner recall, % of the oracle's, mean over {len(cases)} texts, by keys read")
        print(f"{'':24}" + "".join(f"{budget:>9.0%}" for budget in BUDGETS))
        for method in cases[0].methods():
            print(f"{method:24}" + "".join(_cell(cases, method, top_k, budget) for budget in BUDGETS))
        _margins(cases, top_k, name, report)
        _print_figures(cases, top_k)
    if TARGET_TOP_K not in top_ks:
        return
    for bound, recall in targets(cases[0].group, cases[0].tokens):
        figure = f"inner/{name}/k{TARGET_TOP_K}/reads<={bound:.0%}"
        report.must[figure] = (">=", recall)
        choice = one_setting(cases, TARGET_TOP_K, bound)
        if choice is None:
            print(f"\n{name}: no setting of beam reads at most {bound:.0%} on every text")
            continue
        report.figures[figure] = choice.worst
        report.ci[figure] = bootstrap({text: [value] for text, value in choice.recalls.items()}, report.seed, min)
        print(
            f"\n{name}, K = {TARGET_TOP_K}, one setting for all texts, reads <= {bound:.0%}: "
            f"{choice.setting} reads at most {choice.reads:.2%} and keeps at least {choice.worst:.2%} "
            f"({', '.join(f'{text} {value:.2%}' for text, value in choice.recalls.items())})"
        )


def _cell(cases: Sequence[Case], method: str, top_k: int, budget: float) -> str:
    values = [at_budget(case.curve(method, top_k), budget) for case in cases]
    known = [value for value in values if value is not None]
    return f"{100 * mean(known):>9.2f}" if len(known) == len(values) else f"{'-':>9}"


def _margins(cases: Sequence[Case], top_k: int, name: str, report: Report) -> None:
    """The lead of `beam` over the best rival, in the worst text; a must wherever some method reads so little."""
    lines: dict[str, list[str]] = {}
    for budget in BUDGETS:
        for label, figure, exactly in (
            ("lead, worst text", "inner", False),
            ("at exactly equal reads", "inner", True),
            ("by the mean over rows", "inner_by_row", False),
        ):
            found = {case.text: margin(case, top_k, budget, figure, exactly) for case in cases}
            known = {text: value for text, value in found.items() if value is not None}
            worst = min(known, key=lambda text: known[text].value, default=None)
            lines.setdefault(label, []).append("-" if worst is None else f"{100 * known[worst].value:+.2f}")
            if label == "lead, worst text":
                against = "" if worst is None else f"{known[worst].rival or 'no rival'} ({worst})"
                lines.setdefault("against", []).append(against)
                if worst is not None:
                    key = f"lead/{name}/k{top_k}/{budget:.0%}"
                    report.figures[key] = known[worst].value
                    report.must[key] = (">=", 0.0)
                    report.ci[key] = bootstrap({text: [value.value] for text, value in known.items()}, report.seed, min)
    for label in ("lead, worst text", "at exactly equal reads", "by the mean over rows"):
        print(f"{label:24}" + "".join(f"{value:>9}" for value in lines[label]))
    print("nearest rivals: " + "; ".join(f"{b:.0%} {a}" for b, a in zip(BUDGETS, lines["against"], strict=True) if a))


def _print_figures(cases: Sequence[Case], top_k: int) -> None:
    """All figures of the settings that stand for a method: `beam` as users get it, those with one setting."""
    heads = ("reads", "observed", "inner", "by row", "heavy", "worst head", "bias", "error")
    print(f"{'all figures, %':24}" + "".join(f"{head:>11}" for head in heads))
    singles = [name for name in cases[0].methods() if len(cases[0].curve(name, top_k)) == 1]
    for method, setting in [(BEAM, DEFAULT), *((name, "") for name in singles), (ORACLE, "")]:
        points = [
            point
            for case in cases
            for point in case.points
            if (point.method, point.setting, point.top_k) == (method, setting, top_k)
        ]
        columns = [[point.reads for point in points]]
        columns += [[getattr(point.figures, figure) for point in points] for figure in vars(points[0].figures)]
        cells = "".join(f"{100 * mean(column):>11.2f}" for column in columns)
        print(f"{f'{method}, {setting}'.rstrip(', '):24}" + cells)


if __name__ == "__main__":
    run(main)
