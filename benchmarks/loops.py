"""Is a generation that falls into repetition told from one that does not, and how soon?

A model goes on greedily from the beginnings of texts; small models soon repeat themselves. Whether and where an output
loops is decided by its tokens alone: from the first token on from which all that follows repeats with one period, for
at least `ROUNDS` rounds and `TOKENS` tokens. Those that loop and those that do not go through the monitor at default
settings (`benchmarks/replay.py`); the score is `ANCHOR_LOCK`'s highest. To have outputs that do not loop at all, the
texts themselves go through as well. Lead or lag is counted against a detector that sees the tokens: the first time that
an n-gram was seen `ROUNDS` times at one distance.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.replay import Replay
from benchmarks.report import Report, bootstrap, run
from benchmarks.texts import token_ids
from stream_monitor.anchors.auroc import auroc
from stream_monitor.anchors.panel import Kind
from stream_monitor.tracing.model import TracedModel, load
from stream_monitor.v1alpha1 import monitor_pb2

PROMPT, OUTPUT = 64, 384
"""Tokens of a prompt and of what is generated."""
ROUNDS, TOKENS, NGRAM = 3, 64, 8
LONGEST_PERIOD = 100
MUST_AUROC = 0.95


@dataclass(frozen=True)
class Scored:
    """One output: where its loop begins and an n-gram detector finds it (None: never), the highest score, the token of
    the sentence's end at which ANCHOR_LOCK was first raised, and that where it says that the loop began."""

    begins: int | None
    ngram: int | None
    score: float
    raised: int | None
    began: int | None


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")],
    traces: Annotated[Path | None, typer.Option(help="JSON lines of recorded reasoning; adds these texts.")] = None,
    count: Annotated[int, typer.Option(min=8, help="Beginnings that the model goes on from.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the texts and the resamples.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Four times as many.")] = False,
) -> None:
    """AUROC of ANCHOR_LOCK."""
    traced = load(str(model))
    beginnings = count * (4 if full else 1)
    texts = _texts(traced, beginnings, seed, traces)
    replay = Replay(traced)
    generated = _generate(traced, [text[:PROMPT] for text in texts])
    found = [_score(replay, ids) for ids in [*generated, *texts]]
    looping = [one for one in found if one.begins is not None]
    others = [one for one in found if one.begins is None]
    report = Report(
        benchmark="loops",
        config={"model": model.name, "prompt": PROMPT, "output": OUTPUT, "layers": replay.layers, "full": full},
        seed=seed,
        n=len(found),
    )
    print(f"{len(looping)} outputs loop, {len(others)} do not")
    if not looping or not others:
        raise typer.BadParameter("all outputs loop, or none does: take other texts or another --seed")
    area = auroc([one.score for one in looping], [one.score for one in others])
    report.figures |= {
        "auroc": area,
        "looping": len(looping),
        "others": len(others),
        "raised_in_loops": float(np.mean([one.raised is not None for one in looping])),
        "raised_in_others": float(np.mean([one.raised is not None for one in others])),
    }
    report.must["auroc"] = (">=", MUST_AUROC)
    report.ci["auroc"] = _interval(looping, others, seed)
    leads = [one.raised - one.ngram for one in looping if one.raised is not None and one.ngram is not None]
    if leads:
        report.figures["tokens_behind_ngram"] = float(np.median(leads))
        report.ci["tokens_behind_ngram"] = bootstrap(
            {str(i): [float(lead)] for i, lead in enumerate(leads)}, seed, lambda values: float(np.median(list(values)))
        )
    began = [one.began - one.begins for one in looping if one.began is not None and one.begins is not None]
    if began:
        report.figures["began_behind_first_round"] = float(np.median(began))
    print(
        f"ANCHOR_LOCK: AUROC {area:.3f}; raised in {report.figures['raised_in_loops']:.0%} of loops and "
        f"{report.figures['raised_in_others']:.0%} of the others, "
        f"{np.median(leads) if leads else float('nan'):.0f} tokens after the n-gram detector, "
        f"as begun {np.median(began) if began else float('nan'):.0f} tokens behind the first round (medians)"
    )
    report.finish()


def _texts(model: TracedModel, count: int, seed: int, traces: Path | None) -> list[list[int]]:
    """Stretches of prose and, if given, reasoning, `PROMPT + OUTPUT` tokens each."""
    found: list[list[int]] = []
    kinds = ["prose", *(["reasoning"] if traces else [])]
    for kind in kinds:
        wanted = -(-count // len(kinds))
        every = token_ids(model.tokenizer, kind, wanted * (PROMPT + OUTPUT), seed, traces)
        found += [every[at : at + PROMPT + OUTPUT] for at in range(0, len(every), PROMPT + OUTPUT)][:wanted]
    return found[:count]


def _generate(model: TracedModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """What the model goes on with, greedily; the end of a text does not stop it."""
    from transformers import AutoModelForCausalLM

    # With its own attention: ours takes one text at a time.
    decoder = AutoModelForCausalLM.from_pretrained(model.name, dtype=torch.float32).eval()
    out = []
    with torch.inference_mode():
        for first in range(0, len(prompts), 16):
            batch = torch.tensor(prompts[first : first + 16])
            cache, ids = None, batch
            for _ in range(OUTPUT):
                step = decoder(ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                ids = torch.cat([ids, step.logits[:, -1:].argmax(-1)], 1)
            out += ids.tolist()
    return out


def _score(replay: Replay, ids: list[int]) -> Scored:
    output = ids[PROMPT:]
    trace = replay.run(ids, PROMPT)
    locks = [event for event in trace.findings if event.kind == monitor_pb2.EVENT_KIND_ANCHOR_LOCK]
    return Scored(
        begins=loop_begins(output),
        ngram=ngram_repeats(output),
        score=max(0.0, trace.panel.highest[Kind.ANCHOR_LOCK].score),
        raised=locks[0].sentence.end_token - PROMPT if locks else None,
        began=locks[0].began.first_token - PROMPT if locks else None,
    )


def loop_begins(output: Sequence[int]) -> int | None:
    """First token from which all that follows repeats, or None."""
    tokens = np.array(output)
    best = None
    for period in range(1, LONGEST_PERIOD + 1):
        same = tokens[period:] == tokens[:-period]
        broken = np.flatnonzero(~same)
        begin = int(broken[-1]) + 1 if len(broken) else 0
        length = len(tokens) - begin
        if length >= max(ROUNDS * period, TOKENS) and (best is None or begin < best):
            best = begin
    return best


def ngram_repeats(output: Sequence[int]) -> int | None:
    """Token at which an n-gram was seen `ROUNDS` times at one distance, or None."""
    last: dict[tuple[int, ...], int] = {}
    times: Counter[tuple[tuple[int, ...], int]] = Counter()
    for end in range(NGRAM, len(output) + 1):
        gram = tuple(output[end - NGRAM : end])
        if gram in last:
            key = (gram, end - last[gram])
            times[key] += 1
            if times[key] == ROUNDS - 1:
                return end
        last[gram] = end
    return None


def _interval(looping: Sequence[Scored], others: Sequence[Scored], seed: int) -> tuple[float, float]:
    """95% of bootstrap resamples of both groups."""
    draw = np.random.default_rng(seed)
    positive, negative = (np.array([one.score for one in group]) for group in (looping, others))
    areas = [auroc(draw.choice(positive, len(positive)), draw.choice(negative, len(negative))) for _ in range(1000)]
    low, high = np.quantile(areas, (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    run(main)
