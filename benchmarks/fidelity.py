"""How few key blocks a model can be left with and still give the same answer.

A number of 16 tokens is hidden in prose and asked for: so that all that is compared is the answer, and not what a model
makes up behind it. The model, restricted to the kept blocks of each query block and head in every layer, decodes 16
tokens, and the smallest k is found from which it repeats the dense model's: the largest k is tried first, then what
bisection asks for, and the smallest counts from which every larger k tried succeeds (see
`stream_monitor/tracing/fidelity.py`). Beside it stands the paper's descent as far as it is public, which scores a
branch by r keys of its centre block, with the same forced blocks and the same k to choose from. Pruned shares count
forced blocks as kept. A method that fails at the largest k has pruned nothing, and is tried at no other. What 2 tokens
need is read off the same runs: an upper bound. Agreement and divergence are of 512 positions, spread evenly.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer

from benchmarks.report import Must, Report, bootstrap, run
from benchmarks.texts import needle_prompt
from stream_kernels.prefill import Reduction
from stream_kernels.search import SearchConfig
from stream_monitor.tracing.fidelity import CONTINUATION, dense_run, divergence, search_k
from stream_monitor.tracing.model import TracedModel, load

BLOCK_SIZE = 32
BEAM = SearchConfig.for_prompt(block_size=BLOCK_SIZE)
METHODS: dict[str, tuple[SearchConfig, Reduction]] = {
    "beam": (BEAM, "max"),
    "descent r=1": (SearchConfig.paper(block_size=BLOCK_SIZE), "max"),
    "descent r=4": (replace(SearchConfig.paper(block_size=BLOCK_SIZE), probe_keys=4), "max"),
    "descent r=all": (replace(SearchConfig.paper(block_size=BLOCK_SIZE), probe_keys=BLOCK_SIZE), "max"),
}
REDUCTIONS: dict[str, tuple[SearchConfig, Reduction]] = {"beam, mean": (BEAM, "mean"), "beam, union": (BEAM, "union")}
"""Other ways to take the rows of a query block together; union keeps up to 4 k blocks."""

CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16)
FULL_CANDIDATES = (*CANDIDATES, 24, 32, 48, 64, 96)
LENGTHS, FULL_LENGTHS = (1_000,), (1_000, 4_000, 10_000, 20_000)
DEPTHS, FULL_DEPTHS = (0.5,), (0.1, 0.5, 0.9)
PRUNED_MUSTS = {10_000: 0.94, 20_000: 0.97}
"""Share of causal blocks that beam prunes at least, by tokens."""

PAPER_TOKENS = 2
"""Greedy tokens that the paper wants repeated."""

COMPARED = 512
"""Positions whose next-token distributions are compared."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Found:
    """One method on one prompt; `k` is None where no k tried repeats all tokens, and nothing is pruned then."""

    k: int | None
    paper_k: int | None
    causal: float
    square: float
    paper_causal: float
    agreement: float
    mean_kl: float
    keys_read: float


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")],
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a prompt; may be repeated.")] = None,
    depth: Annotated[
        list[float] | None, typer.Option(min=0.0, max=1.0, help="Where the needle lies, 0 to 1; may be repeated.")
    ] = None,
    top_k: Annotated[list[int] | None, typer.Option(min=1, help="A k to try; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Prompts per length and depth of the needle.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the first prompt, and of the resamples.")] = 0,
    device: Annotated[str, typer.Option(help="Of torch.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help=f"Of the linear layers, dense and restricted alike: {' or '.join(DTYPES)}.")
    ] = "float32",
    full: Annotated[
        bool, typer.Option("--full", help="1k to 20k tokens, three depths, every k and the reductions: hours on a CPU.")
    ] = False,
) -> None:
    """Smallest k and pruned share that keep the answer."""
    lengths = tuple(length or (FULL_LENGTHS if full else LENGTHS))
    depths = tuple(depth or (FULL_DEPTHS if full else DEPTHS))
    candidates = tuple(top_k or (FULL_CANDIDATES if full else CANDIDATES))
    methods = METHODS | REDUCTIONS if full else METHODS
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype {dtype!r}; valid: {', '.join(DTYPES)}")
    traced = load(str(model), device, DTYPES[dtype])
    if traced.limit is not None and max(lengths) + CONTINUATION > traced.limit:
        raise typer.BadParameter(f"{max(lengths):,} tokens are beyond this model's {traced.limit:,}; see --length")
    report = Report(
        benchmark="fidelity",
        config={
            "model": model.name,
            "lengths": list(lengths),
            "depths": list(depths),
            "prompts": len(depths) * seeds,
            "candidates": list(candidates),
            "block_size": BLOCK_SIZE,
            "sink_blocks": BEAM.sink_blocks,
            "recent_blocks": BEAM.recent_blocks,
            "width": BEAM.width,
            "min_gain": BEAM.min_gain,
            "reduction": {name: reduction for name, (_, reduction) in methods.items()},
            "positions_compared": COMPARED,
            "device": device,
            "dtype": dtype,
            "full": full,
        },
        seed=seed,
        n=len(depths) * seeds,
    )
    for tokens in lengths:
        found: dict[str, list[Found]] = {name: [] for name in methods}
        answered: list[bool] = []
        for place in depths:
            for number in range(seed, seed + seeds):
                _prompt(traced, tokens, number, place, methods, candidates, found, answered)
        _account(report, tokens, found, answered)
    report.finish()


def _prompt(
    model: TracedModel,
    tokens: int,
    seed: int,
    depth: float,
    methods: dict[str, tuple[SearchConfig, Reduction]],
    candidates: Iterable[int],
    found: dict[str, list[Found]],
    answered: list[bool],
) -> None:
    """All methods on one prompt, appended to `found`; `answered` tells whether the dense model names the number."""
    ids, needle = needle_prompt(model.tokenizer, tokens, seed, depth, CONTINUATION)
    began = time.monotonic()
    dense = dense_run(model, ids)
    said = model.tokenizer.decode(dense.continuation).strip()
    answered.append(bool(said) and needle.startswith(said))
    print(
        f"\n{len(ids):,} tokens, needle at {depth:.0%}, seed {seed}: {model.tokenizer.decode(dense.continuation)!r} "
        f"({time.monotonic() - began:.0f} s; the needle is {needle})\n"
        f"{'method':<15}{'k, 16 tokens':>13}{'k, 2 tokens':>12}{'pruned of causal':>18}{'of square':>11}"
        f"{'agreement':>11}{'mean KL':>10}{'keys read':>11}{'seconds':>9}  tokens repeated by k"
    )
    for name, (search, reduction) in methods.items():
        began = time.monotonic()
        # From as many blocks on as there are, nothing is left to prune.
        some = [k for k in candidates if k < len(ids) // BLOCK_SIZE]
        tried = search_k(model, dense, search, some, reduction)
        k, paper_k = tried.smallest(CONTINUATION), tried.smallest(PAPER_TOKENS)
        best = tried.tried[max(tried.tried) if k is None else k]
        far = divergence(model, dense, best, COMPARED)
        one = Found(
            k=k,
            paper_k=paper_k,
            causal=0.0 if k is None else best.pairs.pruned_of_causal,
            square=0.0 if k is None else best.pairs.pruned_of_square,
            paper_causal=0.0 if paper_k is None else tried.tried[paper_k].pairs.pruned_of_causal,
            agreement=far.agreement,
            mean_kl=far.mean_kl,
            keys_read=best.keys_read,
        )
        found[name].append(one)
        print(
            f"{name:<15}{k or 'none':>13}{paper_k or 'none':>12}{one.causal:>18.1%}{one.square:>11.1%}"
            f"{one.agreement:>11.1%}{one.mean_kl:>10.4f}{one.keys_read:>11,.0f}{time.monotonic() - began:>9.0f}"
            f"  {', '.join(f'{k}: {run.matched}' for k, run in sorted(tried.tried.items()))}",
            flush=True,
        )


def _account(report: Report, tokens: int, found: dict[str, list[Found]], answered: list[bool]) -> None:
    """Figures of one length, averaged over its prompts."""
    report.figures[f"dense_answers/{tokens}"] = fmean(answered)
    for name, prompts in found.items():
        causal = [one.causal for one in prompts]
        key = f"{name}/{tokens}"
        report.figures |= {
            f"pruned_of_causal/{key}": fmean(causal),
            f"pruned_of_square/{key}": fmean(one.square for one in prompts),
            f"pruned_of_causal_2_tokens/{key}": fmean(one.paper_causal for one in prompts),
            f"agreement/{key}": fmean(one.agreement for one in prompts),
            f"mean_kl/{key}": fmean(one.mean_kl for one in prompts),
            f"keys_read/{key}": fmean(one.keys_read for one in prompts),
            f"largest_k/{key}": max(one.k or 0 for one in prompts),
            f"failed/{key}": sum(one.k is None for one in prompts),
        }
        clusters = {str(number): [value] for number, value in enumerate(causal)}
        report.ci[f"pruned_of_causal/{key}"] = bootstrap(clusters, report.seed)
    rivals = [name for name in METHODS if name != "beam"]
    lead = report.figures[f"pruned_of_causal/beam/{tokens}"] - max(
        report.figures[f"pruned_of_causal/{name}/{tokens}"] for name in rivals
    )
    report.figures[f"lead/{tokens}"] = lead
    more: Must = (">=", 1e-6)
    report.must[f"lead/{tokens}"] = more
    if tokens in PRUNED_MUSTS:
        report.must[f"pruned_of_causal/beam/{tokens}"] = (">=", PRUNED_MUSTS[tokens])


if __name__ == "__main__":
    run(main)
