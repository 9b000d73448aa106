"""RULER by the model as it is and by the model restricted to kept blocks.

Both read the same prompts and decode greedily, each going on with its own tokens, until they end their answer or have
spent its budget; restricted, every layer attends to the kept blocks of its query block or token alone, with a search
for each. A score is the share of the references that the answer names. Budgets are twice the tokens of the references
and 8, less than the original's (128 tokens for a needle), to save time. A prompt and its budget take at most the
tokens named. Pruned shares are of the prompt and count forced blocks as kept.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from benchmarks.report import Report, bootstrap, run
from benchmarks.ruler.tasks import TASKS, Sample, make, score
from stream_kernels.search import SearchConfig
from stream_monitor.tracing.attention import Attend, dense_attention
from stream_monitor.tracing.generation import RestrictedAttention, generate, stop_tokens
from stream_monitor.tracing.layer import TraceOptions
from stream_monitor.tracing.model import TracedModel, load
from stream_monitor.tracing.pruning import PairCount

LENGTHS, FULL_LENGTHS = (1_000,), (4_000, 16_000)
SAMPLES, FULL_SAMPLES = 2, 10


@dataclass(frozen=True)
class Scored:
    """One prompt: the scores of both models, 0 to 1, and the pairs of blocks in it."""

    dense: float
    pruned: float
    pairs: PairCount


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model with a chat template.")],
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a prompt; may be repeated.")] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(TASKS)}; may be repeated.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Prompts per task and length.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts, and of the resamples.")] = 0,
    top_k: Annotated[int, typer.Option(min=1, max=4096, help="Blocks kept per head, forced ones aside.")] = 8,
    device: Annotated[str, typer.Option(help="Of torch.")] = "cpu",
    full: Annotated[
        bool, typer.Option("--full", help="4,000 and 16,000 tokens and more prompts: hours on a CPU.")
    ] = False,
) -> None:
    """RULER's scores with the kept blocks alone, against those of the dense model."""
    lengths = tuple(dict.fromkeys(length or (FULL_LENGTHS if full else LENGTHS)))
    tasks = tuple(dict.fromkeys(task or TASKS))
    count = samples or (FULL_SAMPLES if full else SAMPLES)
    for name in tasks:
        if name not in TASKS:
            raise typer.BadParameter(f"task {name!r}; valid: {', '.join(TASKS)}")
    try:
        traced = load(str(model), device)
        if traced.limit is not None and max(lengths) > traced.limit:
            raise typer.BadParameter(f"{max(lengths):,} tokens are beyond this model's {traced.limit:,}; see --length")
        prompts = {
            (tokens, name): [make(traced.tokenizer, name, tokens, seed, number) for number in range(count)]
            for tokens in lengths
            for name in tasks
        }
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    search = SearchConfig.for_prompt(top_k=top_k)
    report = Report(
        benchmark="ruler",
        config={
            "model": model.name,
            "lengths": list(lengths),
            "tasks": list(tasks),
            "samples": count,
            "top_k": top_k,
            "block_size": search.block_size,
            "sink_blocks": search.sink_blocks,
            "recent_blocks": search.recent_blocks,
            "width": search.width,
            "min_gain": search.min_gain,
            "device": device,
            "full": full,
        },
        seed=seed,
        n=len(prompts) * count,
        must={"ratio": (">=", 0.95)},
    )
    found: dict[tuple[int, str], list[Scored]] = {}
    for tokens in lengths:
        print(
            f"\n{tokens:,} tokens, top {top_k}, {count} prompts a task\n"
            f"{'task':<18}{'dense':>8}{'pruned':>8}{'pruned of causal':>18}{'seconds':>9}"
        )
        for name in tasks:
            began = time.monotonic()
            scored = [_score(traced, sample, search) for sample in prompts[tokens, name]]
            found[tokens, name] = scored
            print(_line(name, scored, time.monotonic() - began), flush=True)
        every = [one for name in tasks for one in found[tokens, name]]
        print(f"{'all':<18}{_cells(every)}")
    _account(report, found)
    report.finish()


def _score(model: TracedModel, sample: Sample, search: SearchConfig) -> Scored:
    """Has both models answer."""
    restricted = RestrictedAttention(TraceOptions(search))
    stop = stop_tokens(model)

    def answered(read: Attend, decode: Attend) -> float:
        answer = generate(model, sample.ids, read, decode, sample.budget, stop)
        return score(model.tokenizer.decode(answer), sample.references)

    dense, pruned = answered(dense_attention, dense_attention), answered(restricted.read, restricted.decode)
    return Scored(dense, pruned, restricted.pairs)


def _line(name: str, scored: Sequence[Scored], seconds: float) -> str:
    alone = "" if any(one.dense for one in scored) else "  (the dense model solves none: says nothing)"
    return f"{name:<18}{_cells(scored)}{seconds:>9.0f}{alone}"


def _cells(scored: Sequence[Scored]) -> str:
    means = _means(scored)
    return f"{means['dense']:>8.2f}{means['pruned']:>8.2f}{means['pruned_of_causal']:>18.1%}"


def _means(scored: Sequence[Scored]) -> dict[str, float]:
    return {
        "dense": fmean(one.dense for one in scored),
        "pruned": fmean(one.pruned for one in scored),
        "pruned_of_causal": sum((one.pairs for one in scored), PairCount()).pruned_of_causal,
    }


def _account(report: Report, found: dict[tuple[int, str], list[Scored]]) -> None:
    """Figures of all prompts, of each length, and of each task and length."""
    every = [one for scored in found.values() for one in scored]
    if not any(one.dense for one in every):
        raise typer.BadParameter("the dense model scores 0 on every task, so there is nothing to compare; see --model")
    groups = {"": every}
    for tokens, name in found:
        groups.setdefault(f"/{tokens}", []).extend(found[tokens, name])
        groups[f"/{name}/{tokens}"] = found[tokens, name]
    for key, scored in groups.items():
        report.figures |= {f"{figure}{key}": value for figure, value in _means(scored).items()}
    for key in ("", *(f"/{tokens}" for tokens in dict.fromkeys(tokens for tokens, _ in found))):
        # A length at which the dense model solves nothing has no ratio.
        if report.figures[f"dense{key}"]:
            pairs = {str(number): [one.pruned, one.dense] for number, one in enumerate(groups[key])}
            report.figures[f"ratio{key}"] = ratio([score for pair in pairs.values() for score in pair])
            report.ci[f"ratio{key}"] = bootstrap(pairs, report.seed, ratio)
    low, high = report.ci["ratio"]
    print(f"\npruned / dense {report.figures['ratio']:.1%}, 95% interval {low:.1%} to {high:.1%}")


def ratio(scores: Sequence[float]) -> float:
    """Sum of the pruned scores over that of the dense ones, which come in turn; 0 if the dense ones are all 0."""
    dense = sum(scores[1::2])
    return sum(scores[::2]) / dense if dense else 0.0


if __name__ == "__main__":
    run(main)
