"""Does hiding a thought anchor change what the model predicts later, more than hiding another sentence does?

Every text is read once; then its highest anchors by the kept blocks, those by exact attention, and their controls are
hidden one after another (see `stream_monitor/tracing/causal.py`). Beside the anchors stand rankings that need no
attention, over the same pairs; and like questions are asked of what the live detector scores highest as a shift
(`causal_shifts.py`), and of what the prompt's share of the attention says of its effect (`causal_prompt.py`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, TypeVar

import typer

from benchmarks.report import Report, run
from stream_monitor.tracing.causal import OPTIONS, Outcome, TextResult, measure_text
from stream_monitor.tracing.causal_statistics import (
    SHIFTS_NEEDED,
    TRIVIAL,
    Source,
    figure,
    handicapped_share,
    higher_share,
    interactions,
    mean_of_prompt_tests,
    median_interaction,
    median_ratio,
    outcomes,
    pairs,
    positive_share,
    prompt_losses,
    share_of_exact,
    trivial_share,
)
from stream_monitor.tracing.model import load
from stream_monitor.tracing.pruning import PairCount
from stream_monitor.tracing.texts import evenly, read_texts

TEXTS, TOKENS = 5, 1_000
FULL_TEXTS, FULL_TOKENS = 16, 1_500

SOURCES: tuple[Source, ...] = ("kept", "exact")
LOW = "kept/median_log_ratio/low"
_One = TypeVar("_One")


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")],
    traces: Annotated[Path, typer.Option(help="JSON lines with the strings prompt and reasoning.")],
    count: Annotated[int | None, typer.Option(min=2, help="Traces, evenly from the file.")] = None,
    tokens: Annotated[int | None, typer.Option(min=400, help="Longest part of a trace that is read.")] = None,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    device: Annotated[str, typer.Option(help="Of torch.")] = "cpu",
    full: Annotated[
        bool, typer.Option("--full", help=f"{FULL_TEXTS} traces of {FULL_TOKENS:,} tokens unless told otherwise.")
    ] = False,
) -> None:
    """Effects of hidden anchors and of their controls."""
    longest = tokens or (FULL_TOKENS if full else TOKENS)
    chosen = evenly(read_texts(traces), count or (FULL_TEXTS if full else TEXTS))
    traced = load(str(model), device)
    found = []
    for number, text in enumerate(chosen):
        began = time.monotonic()
        found.append(measure_text(traced, *text.tokens(traced, longest), with_detectors=True))
        print(f"\n{number}: {text.name}, {time.monotonic() - began:.0f} s, {found[-1].alarms} shifts reported")
        for source in SOURCES:
            for outcome in outcomes(found[-1:], source):
                print(_line(source, outcome), flush=True)
    report = Report(
        benchmark="causal",
        config={
            "model": model.name,
            "traces": len(chosen),
            "tokens": longest,
            "options": asdict(OPTIONS),
            "device": device,
            "full": full,
        },
        seed=seed,
        n=len(chosen),
        must={
            # More than 0.
            LOW: (">=", 1e-6),
            "higher_share_of_exact": (">=", 0.95),
            "shift/median_interaction": (">=", 1e-6),
        },
    )
    _account(report, found)
    report.finish()


def _line(source: Source, outcome: Outcome) -> str:
    controls = ", ".join(f"{one.sentence} ({one.effect:+.2f})" for one in outcome.controls)
    gain = outcome.anchor.effect - fmean(one.effect for one in outcome.controls)
    anchor = f"sentence {outcome.anchor.sentence} ({outcome.anchor.effect:+.2f})"
    return f"  {source:<6}{anchor} against {controls}: {gain:+.2f}"


def _account(report: Report, texts: list[TextResult]) -> None:
    """Figures into the report and on the screen."""
    pruned = sum((text.pairs for text in texts), PairCount()).pruned_of_causal
    report.figures["pruned_of_causal"] = pruned
    print(f"\npruned: {pruned:.1%} of the causal blocks")
    for source in SOURCES:
        report.figures[f"{source}/anchors"] = len(list(outcomes(texts, source)))
        report.figures[f"{source}/pairs"] = len(list(pairs(texts, source)))
        _add(report, texts, f"{source}/median_log_ratio", median_ratio(source))
        _add(report, texts, f"{source}/higher_share", higher_share(source))
        _add(report, texts, f"{source}/handicapped_share", handicapped_share(source))
        for name in TRIVIAL:
            _add(report, texts, f"{source}/trivial/{name}", trivial_share(name, source))
    _add(report, texts, "higher_share_of_exact", share_of_exact)
    if "kept/median_log_ratio" in report.ci:
        report.figures[LOW] = report.ci["kept/median_log_ratio"][0]
    _account_of_prompts(report, texts)
    alarms = sum(one.alarm for text in texts for one in text.interactions)
    tried = len(interactions(texts))
    report.figures |= {"shift/reported": sum(text.alarms for text in texts), "shift/reported_tried": alarms}
    report.figures |= {"shift/tried": tried, "shift/controls": len(interactions(texts, control=True))}
    print(f"shifts: {tried} tried, the highest of the detector's score, {alarms} of them alarms")
    if tried < SHIFTS_NEEDED:
        print(f"too few shifts to say anything: at least {SHIFTS_NEEDED} are needed; the must on them is not met")
        return
    _add(report, texts, "shift/median_interaction", median_interaction())
    _add(report, texts, "shift/positive_share", positive_share)
    for name, nearer in (("new_anchor_nearer", True), ("new_anchor_farther", False)):
        report.figures[f"shift/{name}"] = len(interactions(texts, nearer=nearer))
        _add(report, texts, f"shift/{name}/median_interaction", median_interaction(nearer=nearer))
    _add(report, texts, "shift/controls/median_interaction", median_interaction(control=True))


def _account_of_prompts(report: Report, texts: list[TextResult]) -> None:
    findings = [len(text.prompt.reported_at) for text in texts if text.prompt is not None]
    report.figures |= {"prompt/texts": len(findings), "prompt/reported": sum(findings)}
    print(f"prompts: hidden in {len(findings)} texts, {sum(findings)} detachments reported")
    for name in ("agreement", "given_place", "place"):
        _add(report, texts, f"prompt/{name}", mean_of_prompt_tests(name))
    for name, reported in (("rise", False), ("finding", True)):
        losses = prompt_losses(texts, reported)
        report.figures[f"prompt/{name}/texts"] = len(losses)
        print(f"texts with a {name} of the detector's whose effect can be told: {len(losses)}")
        if losses:
            _add(report, losses, f"prompt/{name}/change", lambda some: median(loss.change for loss in some))
            _add(report, losses, f"prompt/{name}/beyond_place", lambda some: median(loss.beyond_place for loss in some))


def _add(report: Report, texts: Sequence[_One], name: str, statistic: Callable[[Sequence[_One]], float]) -> None:
    """A figure with its interval, where it is defined."""
    found = figure(texts, statistic, report.seed)
    print(f"{name:<30}{found.value:>8.3f}  ({found.low:.3f} to {found.high:.3f})")
    if found.value == found.value:
        report.figures[name] = found.value
        report.ci[name] = (found.low, found.high)


if __name__ == "__main__":
    run(main)
