"""Do the kept blocks name the same thought anchors as all of the attention does?

A recorded reasoning trace goes through the model once. In every layer the sentence scores of exact attention and those
read from the kept blocks of each method are taken, each side with receiver heads of its own (see
`stream_monitor/tracing/thought_anchors.py`), and the two anchor curves are compared over the sentences of the
reasoning. k counts the blocks that each row keeps for itself, as when a token is decoded: a query block keeps what its
rows keep (`union`), at most 4 k blocks. Beside it stand

* masks with k blocks for all rows of a query block together, by their mean or their largest share;
* beam with a pass whose every layer sees only what the layer before it kept, so that the model itself has changed a
  little;
* the paper's descent as far as it is public, with the same forced blocks. It keeps k blocks per query block by
  definition; so it stands here with 4 k as well, the most that beam may keep.

Pruned shares count forced blocks as kept.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.report import Must, Report, bootstrap, run
from stream_kernels.prefill import PrefillSummary
from stream_kernels.search import SearchConfig
from stream_monitor.tracing.attention import LayerInputs, dense_attention
from stream_monitor.tracing.layer import TraceOptions, attend, search_layer
from stream_monitor.tracing.model import TracedModel, load
from stream_monitor.tracing.pruning import PairCount, count_pairs
from stream_monitor.tracing.sentence_mass import read_sentence_mass
from stream_monitor.tracing.sentences import (
    anchor_candidates,
    sentence_of_tokens,
    split_sentences,
    token_counts,
    token_texts,
)
from stream_monitor.tracing.texts import Text, evenly, read_texts
from stream_monitor.tracing.thought_anchors import (
    Agreement,
    Scores,
    agreement,
    exact_vertical_scores,
    find_anchors,
    vertical_scores,
)

BLOCK_SIZE = 32
KS = (4, 8)
TRACES, TOKENS = 4, 1_000
"""Traces read, and the tokens they are cut to, unless all is asked for."""

BEAM = SearchConfig.for_prompt(block_size=BLOCK_SIZE)
DESCENT = SearchConfig.paper(block_size=BLOCK_SIZE)
UNION = 4
"""Most blocks of a query block under `union`, in multiples of k (`search_prompt`)."""


@dataclass(frozen=True)
class Method:
    """How masks are made for a k: `top_k` is `times` k."""

    options: TraceOptions
    times: int = 1

    def at(self, k: int) -> TraceOptions:
        return replace(self.options, search=replace(self.options.search, top_k=self.times * k))


METHODS = {
    "beam": Method(TraceOptions(BEAM, "dense", "union")),
    "beam, mean": Method(TraceOptions(BEAM, "dense", "mean")),
    "beam, max": Method(TraceOptions(BEAM, "dense", "max")),
    "beam, pruned pass": Method(TraceOptions(BEAM, "pruned", "union")),
    "descent r=1": Method(TraceOptions(DESCENT, "dense", "mean")),
    "descent r=4": Method(TraceOptions(replace(DESCENT, probe_keys=4), "dense", "mean")),
    "descent r=4, 4 k": Method(TraceOptions(replace(DESCENT, probe_keys=4), "dense", "mean"), UNION),
}
"""What the next layer sees, and how the rows of a query block are taken together, is part of a method."""

MUSTS: dict[str, Must] = {
    "beam/spearman/4": (">=", 0.95),
    "beam/top5/4": (">=", 0.8),
    "beam/spearman/8": (">=", 0.98),
    "beam/top5/8": (">=", 0.9),
}


@dataclass
class _Reading:
    """One method's way through a trace."""

    options: TraceOptions
    vertical: list[Scores] = field(default_factory=list)
    pairs: PairCount = field(default_factory=PairCount)

    def read(self, inputs: LayerInputs, sentences: NDArray[np.int64], tokens: NDArray[np.int64]) -> PrefillSummary:
        """Takes in a layer; what the search found in it."""
        size = self.options.search.block_size
        found = search_layer(inputs, self.options)
        self.pairs += count_pairs(found, size, inputs.window)
        self.vertical.append(vertical_scores(read_sentence_mass(inputs, found, size, sentences), tokens))
        return found


@dataclass(frozen=True)
class Found:
    """One method on one trace."""

    agreement: Agreement
    pairs: PairCount


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")],
    traces: Annotated[Path, typer.Option(help="JSON lines with the strings prompt and reasoning.")],
    count: Annotated[int, typer.Option(min=2, help="Traces, evenly from the file.")] = TRACES,
    tokens: Annotated[int, typer.Option(min=400, help="Longest part of a trace that is read.")] = TOKENS,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    device: Annotated[str, typer.Option(help="Of torch.")] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="All traces, to the model's limit: hours on a CPU.")] = False,
) -> None:
    """Agreement of anchors."""
    traced, texts = load(str(model), device), read_texts(traces)
    longest = (traced.limit or 10**9) if full else tokens
    chosen = texts if full else evenly(texts, count)
    report = Report(
        benchmark="anchors",
        config={
            "model": model.name,
            "traces": len(chosen),
            "tokens": longest,
            "methods": {name: asdict(method) for name, method in METHODS.items()},
            "device": device,
            "full": full,
        },
        seed=seed,
        n=len(chosen),
        must=MUSTS,
    )
    found: dict[str, dict[str, Found]] = {}
    for number, text in enumerate(chosen):
        for key, one in _one_trace(traced, number, text, longest).items():
            found.setdefault(key, {})[text.name] = one
    _account(report, found)
    report.finish()


def _one_trace(model: TracedModel, number: int, text: Text, longest: int) -> dict[str, Found]:
    """All methods at every k, by `method/k`."""
    began = time.monotonic()
    ids, _ = text.tokens(model, longest)
    parts = split_sentences(token_texts(model.tokenizer, ids))
    sentences, counts, candidates = sentence_of_tokens(parts), token_counts(parts), anchor_candidates(parts)
    readings = {f"{name}/{k}": _Reading(method.at(k)) for name, method in METHODS.items() for k in KS}
    exact: list[Scores] = []
    beside = [reading for reading in readings.values() if reading.options.attention == "dense"]

    def read_all(inputs: LayerInputs) -> torch.Tensor:
        exact.append(exact_vertical_scores(inputs, sentences))
        for reading in beside:
            reading.read(inputs, sentences, counts)
        return dense_attention(inputs)

    def read_alone(reading: _Reading, inputs: LayerInputs) -> torch.Tensor:
        return attend(inputs, reading.read(inputs, sentences, counts), reading.options)

    model.run(ids, read_all)
    for reading in readings.values():
        if reading.options.attention == "pruned":
            model.run(ids, partial(read_alone, reading))
    reference = find_anchors(exact, candidates)
    print(
        f"\n{number}: {text.name}, {len(ids):,} tokens, {len(parts)} sentences, {time.monotonic() - began:.0f} s\n"
        f"{'method/k':<22}{'Spearman':>10}{'partial':>10}{'top 5':>8}{'receivers':>11}{'pruned of causal':>18}"
        f"{'of square':>11}"
    )
    found = {}
    for key, reading in readings.items():
        found[key] = Found(agreement(find_anchors(reading.vertical, candidates), reference, counts), reading.pairs)
        print(_line(key, [found[key]]), flush=True)
    return found


def _line(name: str, found: Iterable[Found]) -> str:
    values = _means(list(found))
    return (
        f"{name:<22}{values['spearman']:>10.3f}{values['partial']:>10.3f}{values['top5']:>8.2f}"
        f"{values['receivers']:>11.2f}{values['causal']:>18.1%}{values['square']:>11.1%}"
    )


def _means(found: list[Found]) -> dict[str, float]:
    return {
        "spearman": fmean(one.agreement.spearman for one in found),
        "partial": fmean(one.agreement.partial for one in found),
        "top5": fmean(one.agreement.top for one in found),
        "receivers": fmean(one.agreement.shared_receivers for one in found),
        "causal": fmean(one.pairs.pruned_of_causal for one in found),
        "square": fmean(one.pairs.pruned_of_square for one in found),
    }


def _account(report: Report, found: dict[str, dict[str, Found]]) -> None:
    """Means over traces into the report and on the screen, and the worst trace of each."""
    print(f"\nmean of {report.n} traces, each with the same weight")
    for key, by_trace in found.items():
        method, k = key.split("/")
        print(_line(key, by_trace.values()))
        for figure, value in _means(list(by_trace.values())).items():
            report.figures[f"{method}/{figure}/{k}"] = value
        for figure in ("spearman", "top5"):
            per_trace = {name: [_means([one])[figure]] for name, one in by_trace.items()}
            report.ci[f"{method}/{figure}/{k}"] = bootstrap(per_trace, report.seed)
        worst = min(by_trace, key=lambda name: by_trace[name].agreement.spearman)
        print(f"{'':<22}worst: {by_trace[worst].agreement.spearman:.3f}, {worst}")
        report.figures[f"{method}/worst_spearman/{k}"] = by_trace[worst].agreement.spearman


if __name__ == "__main__":
    run(main)
