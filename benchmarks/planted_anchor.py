"""Does the monitor name the sentence that an answer depends on?

A prompt of at least 40 notes, one of which says what is asked for, at depths spread evenly; the answer is given, and
goes through the monitor at default settings (`benchmarks/replay.py`). A hit is the note among the three sentences of
the prompt that the answer rests on most, the question itself and the first sentence aside: the question names the same
thing, and whatever it is, the answer looks at it. Beside it stand the same with exact attention in place of the search,
chance, and the notes that share most words with the question.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import typer

from benchmarks.replay import Replay
from benchmarks.report import Report, bootstrap, run
from stream_monitor.config import CaptureSettings
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.tracing.model import TracedModel, load

NOTES, TOP = 48, 3
MUST = 0.95
"""Of the hit rate with exact attention."""

_PLACES = ("harbour", "library", "market", "garden", "station", "museum", "bakery", "quarry", "chapel", "stable")
_PEOPLE = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas")
_THINGS = ("crates", "lanterns", "barrels", "letters", "ropes", "candles", "baskets", "coins")


@dataclass(frozen=True)
class Planted:
    """A prompt and its answer.

    Attributes:
        ids: of both; prompt_tokens: of the prompt.
        note: text of the note asked for.
        overlap: whether that note is among the `TOP` that share most words with the question.
    """

    ids: list[int]
    prompt_tokens: int
    note: str
    overlap: bool


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model with a chat template.")],
    count: Annotated[int, typer.Option(min=4, help="Prompts.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the notes and the resamples.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Eight times as many.")] = False,
) -> None:
    """Hit rate in the top three."""
    traced = load(str(model))
    wanted = count * (8 if full else 1)
    settings = CaptureSettings()
    monitors = {
        "monitor": Replay(traced, settings),
        "exact": Replay(traced, settings.model_copy(update={"strategy": "exact"})),
    }
    report = Report(
        benchmark="planted_anchor",
        config={
            "model": model.name,
            "notes": NOTES,
            "top": TOP,
            "layers": monitors["monitor"].layers,
            "stride": settings.stride,
            "full": full,
        },
        seed=seed,
        n=wanted,
    )
    hits: dict[str, list[float]] = {name: [] for name in (*monitors, "lexical_overlap")}
    for number in range(wanted):
        planted = plant(traced, seed + number, number / max(1, wanted - 1))
        hits["lexical_overlap"].append(float(planted.overlap))
        for name, monitor in monitors.items():
            trace = monitor.run(planted.ids, planted.prompt_tokens)
            hits[name].append(float(planted.note in heaviest(traced, planted, trace)))
    for name, found in hits.items():
        report.figures[f"hit_rate/{name}"] = fmean(found)
        report.ci[f"hit_rate/{name}"] = bootstrap({str(i): [hit] for i, hit in enumerate(found)}, seed)
        print(f"{name:<16}{fmean(found):>7.1%} of {wanted}")
    report.figures["hit_rate/chance"] = TOP / NOTES
    print(f"{'chance':<16}{TOP / NOTES:>7.1%}")
    exact = report.figures["hit_rate/exact"]
    report.figures["of_exact"] = report.figures["hit_rate/monitor"] / exact if exact else 0.0
    report.must["of_exact"] = (">=", MUST)
    report.finish()


def plant(model: TracedModel, seed: int, depth: float) -> Planted:
    """A prompt whose note in question lies at `depth`, 0 to 1, and its answer."""
    draw = random.Random(seed)
    pairs = draw.sample([(person, place) for person in _PEOPLE for place in _PLACES], NOTES)
    things = [draw.choice(_THINGS) for _ in pairs]
    notes = [
        f"{person} from the {place} counted {draw.randrange(100, 1000)} {thing} that day."
        for (person, place), thing in zip(pairs, things, strict=True)
    ]
    at = round(depth * (NOTES - 1))
    person, place = pairs[at]
    question = f"How many {things[at]} did {person} from the {place} count?"
    text = "These are the notes of a clerk. " + " ".join(notes) + f"\n\n{question}"
    prompt = model.chat_tokens([{"role": "user", "content": text}])
    answer = model.tokenizer(notes[at], add_special_tokens=False)["input_ids"]
    words = _words(question)
    closest = sorted(notes, key=lambda note: -len(words & _words(note)))[:TOP]
    return Planted([*prompt, *answer], len(prompt), notes[at], notes[at] in closest)


def heaviest(model: TracedModel, planted: Planted, trace: RequestTrace) -> list[str]:
    """Texts of the `TOP` notes that the answer rests on most, heaviest first."""
    first, matrix = trace.prompt_sentences, trace.matrix()
    assert matrix.captured[first:].any(), "no row of the answer was captured"
    read = (matrix.rows >= first) & (matrix.columns < first)
    mass = np.bincount(matrix.columns[read], matrix.captured[matrix.rows[read]] * matrix.shares[read], minlength=first)
    texts = [model.tokenizer.decode(planted.ids[span.start : span.end]).strip() for span in trace.spans[:first]]
    notes = [index for index in range(1, first) if "?" not in texts[index]]
    notes.sort(key=lambda index: -mass[index])
    return [_only_note(texts[index]) for index in notes[:TOP]]


def _only_note(text: str) -> str:
    """A sentence without what a cut left in front of it."""
    found = re.search(r"[A-Z]\w+ from the \w+ counted \d+ \w+ that day\.", text)
    return found.group() if found else text


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


if __name__ == "__main__":
    run(main)
