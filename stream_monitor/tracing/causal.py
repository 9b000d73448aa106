"""Are the thought anchors of a text causal for the model: does it predict otherwise when it cannot see them?

The **flagged** sentences of a text are the highest of its anchor curve. Each is hidden from all later tokens
(`suppression.py`), and so is each of its **controls**: sentences of about the same length, as near by as there are,
from the lower half of the curve. All of them are judged on one later **window**, from `ANCHOR_GAP` sentences behind the
last of them to the end of the text; the **effect** of a sentence is the log of the mean KL divergence there. Anchors
come from the kept blocks, and beside them from exact attention, each with controls of its own.

ANCHOR_SHIFT and PROMPT_DETACHMENT have tests of their own (`causal_shifts.py`, `causal_prompt.py`).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stream_kernels.search import SearchConfig
from stream_monitor.anchors.matrix import ANCHOR_GAP
from stream_monitor.tracing.attention import LayerInputs, dense_attention
from stream_monitor.tracing.causal_prompt import PromptTest, judge_sentences, prompt_sentences, weigh_prompt
from stream_monitor.tracing.causal_shifts import Interaction, choose_shifts, interaction, score_sentences
from stream_monitor.tracing.layer import TraceOptions, search_layer
from stream_monitor.tracing.model import TracedModel
from stream_monitor.tracing.pruning import PairCount, count_pairs
from stream_monitor.tracing.sentence_mass import SentenceMass, read_sentence_mass
from stream_monitor.tracing.sentences import (
    Sentence,
    anchor_candidates,
    sentence_of_tokens,
    split_sentences,
    token_counts,
    token_texts,
)
from stream_monitor.tracing.suppression import FreePass, divergences, effect, free_pass
from stream_monitor.tracing.thought_anchors import (
    Anchors,
    Scores,
    exact_vertical_scores,
    find_anchors,
    vertical_scores,
)

OPTIONS = TraceOptions(SearchConfig.for_prompt(), "dense", "mean")
"""How anchors are sought: the masks of `stream-monitor trace` at its default k, laid over the unrestricted model."""

ANCHORS, CONTROLS = 3, 2
"""Flagged sentences that are tried per text, and controls of each."""
FLAGGED, UNFLAGGED = 0.25, 0.5
"""What counts as flagged, the highest part of the curve; and as not flagged, the lowest. Between them lies neither."""
LENGTH_TOLERANCE = 0.25
"""Most that a control's tokens may differ from its anchor's, relative to the latter."""
SHORTEST_WINDOW = 100
"""Tokens that a window has at least."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Reading:
    """What the unsuppressed pass over a text shows: T tokens, S sentences.

    Attributes:
        free: the pass.
        sentences: of the text.
        kept, exact: the anchor curve from the kept blocks, and from all of the attention.
        mass: float64 [S, S], each sentence's attention on each in the kept blocks, mean over layers and heads.
        pairs: of blocks that the masks kept.
    """

    free: FreePass
    sentences: Sequence[Sentence]
    kept: Anchors
    exact: Anchors
    mass: Scores
    pairs: PairCount

    def span(self, sentence: int) -> tuple[int, int]:
        """Tokens [start, end)."""
        return self.sentences[sentence].start, self.sentences[sentence].end


@dataclass(frozen=True)
class Trial:
    """A flagged sentence, its controls, and the first token of the window that all are judged on."""

    anchor: int
    controls: tuple[int, ...]
    window: int


@dataclass(frozen=True)
class Measured:
    """What a sentence did when it was hidden, and what trivial rankings go by.

    Attributes:
        sentence: its number.
        effect: log of the mean KL on the window, nats.
        tokens: its length.
        overlap: share of the window's words that occur in it.
    """

    sentence: int
    effect: float
    tokens: int
    overlap: float


@dataclass(frozen=True)
class Outcome:
    """A trial that was measured."""

    anchor: Measured
    controls: tuple[Measured, ...]


@dataclass(frozen=True)
class TextResult:
    """All of one text.

    Attributes:
        kept, exact: trials of the anchors from the kept blocks, and from all of the attention.
        interactions: of the shifts that were tried, and of their controls.
        alarms: shifts that the detector reported.
        prompt: the test of PROMPT_DETACHMENT; None where it was not asked for, or has nothing to go by.
        pairs: of blocks that the masks kept.
    """

    kept: tuple[Outcome, ...]
    exact: tuple[Outcome, ...]
    interactions: tuple[Interaction, ...]
    alarms: int
    prompt: PromptTest | None
    pairs: PairCount


def measure_text(
    model: TracedModel, ids: list[int], prompt: int, options: TraceOptions = OPTIONS, with_detectors: bool = False
) -> TextResult:
    """Finds the anchors of a text, and hides them and their controls one after another.

    Args:
        model: loaded.
        ids: the text, cut to what is to be read.
        prompt: tokens of it that came before the reasoning, where no tags tell; see `reasoning_candidates`.
        options: of the masks.
        with_detectors: try shifts and hide the prompt as well, which takes about as long again.
    """
    reading = read_text(model, ids, prompt, options)
    trials = {"kept": choose_trials(reading.kept, reading.sentences)}
    trials["exact"] = choose_trials(reading.exact, reading.sentences)
    scored = score_sentences(reading.mass, reading.kept.candidates, token_counts(reading.sentences))
    shifts = choose_shifts(scored, reading.sentences) if with_detectors else []

    every = [*trials["kept"], *trials["exact"]]
    hidden = {sentence for trial in every for sentence in (trial.anchor, *trial.controls)}
    hidden |= {sentence for shift in shifts for sentence in (shift.old, shift.new)}
    order = sorted(hidden)
    since = min([trial.window for trial in every] + [shift.before[0] for shift in shifts], default=0)
    found = divergences(model, reading.free, [reading.span(sentence) for sentence in order], since)
    kl = dict(zip(order, found, strict=True))
    return TextResult(
        kept=tuple(_outcome(trial, kl, reading.sentences) for trial in trials["kept"]),
        exact=tuple(_outcome(trial, kl, reading.sentences) for trial in trials["exact"]),
        interactions=tuple(interaction(kl[shift.old], kl[shift.new], shift) for shift in shifts),
        alarms=sum(one.alarm for one in scored),
        prompt=_hide_prompt(model, reading, prompt) if with_detectors else None,
        pairs=reading.pairs,
    )


def _hide_prompt(model: TracedModel, reading: Reading, prompt: int) -> PromptTest | None:
    count = prompt_sentences(reading.sentences, prompt)
    if not 2 <= count < len(reading.sentences):
        return None
    judged = judge_sentences(reading.mass, reading.sentences, count)
    span = reading.sentences[1].start, reading.sentences[count].start
    return weigh_prompt(divergences(model, reading.free, [span])[0], judged, reading.sentences)


def read_text(model: TracedModel, ids: list[int], prompt: int, options: TraceOptions = OPTIONS) -> Reading:
    """One pass of the unrestricted model over a text; see `measure_text`."""
    sentences = split_sentences(token_texts(model.tokenizer, ids))
    of_tokens, counts = sentence_of_tokens(sentences), token_counts(sentences)
    kept: list[Scores] = []
    exact: list[Scores] = []
    total = np.zeros((len(sentences), len(sentences)))
    pairs = PairCount()

    def look(inputs: LayerInputs) -> torch.Tensor:
        nonlocal pairs
        found = search_layer(inputs, options)
        pairs += count_pairs(found, options.search.block_size, inputs.window)
        mass = read_sentence_mass(inputs, found, options.search.block_size, of_tokens)
        kept.append(vertical_scores(mass, counts))
        exact.append(exact_vertical_scores(inputs, of_tokens))
        total[:] += _over_heads(mass)
        return dense_attention(inputs)

    free = free_pass(model, ids, look)
    candidates = reasoning_candidates(sentences, prompt)
    return Reading(
        free=free,
        sentences=sentences,
        kept=find_anchors(kept, candidates),
        exact=find_anchors(exact, candidates),
        mass=total / model.layers,
        pairs=pairs,
    )


def _over_heads(mass: SentenceMass) -> Scores:
    """One layer's masses as float64 [S, S], mean over the heads."""
    count, heads = mass.unobserved.shape
    codes = mass.query.astype(np.int64) * count + mass.key
    return np.asarray(np.bincount(codes, mass.mass, count * count).reshape(count, count) / heads)


def reasoning_candidates(sentences: Sequence[Sentence], prompt: int) -> NDArray[np.bool_]:
    """Which sentences may be anchors, bool [S]: never the first, whatever it is, as attention rests there.

    Without reasoning tags (`anchor_candidates`) those that begin at token `prompt` or later.
    """
    candidates = anchor_candidates(sentences)
    if not any(sentence.role == "reasoning" for sentence in sentences):
        candidates &= np.array([sentence.start >= prompt for sentence in sentences], bool)
    candidates[:1] = False
    return candidates


def choose_trials(anchors: Anchors, sentences: Sequence[Sentence]) -> list[Trial]:
    """The highest flagged sentences that have `CONTROLS` controls and a window; a control serves one of them alone.

    Of two controls as near to the anchor, the later comes first: it is nearer to the window, which favours it.
    """
    ranking = anchors.ranking().tolist()
    flagged = ranking[: math.ceil(FLAGGED * len(ranking))]
    free = set(ranking[len(ranking) - math.floor(UNFLAGGED * len(ranking)) :])
    trials: list[Trial] = []
    for anchor in flagged:
        fitting = [
            sentence
            for sentence in sorted(free, key=lambda sentence: (abs(sentence - anchor), -sentence))
            if _alike(sentences[sentence], sentences[anchor]) and _window(sentence, sentences) is not None
        ]
        controls = tuple(fitting[:CONTROLS])
        window = _window(max(anchor, *controls), sentences) if len(controls) == CONTROLS else None
        if window is not None and len(trials) < ANCHORS:
            free -= set(controls)
            trials.append(Trial(anchor, controls, window))
    return trials


def _alike(control: Sentence, anchor: Sentence) -> bool:
    tokens = anchor.end - anchor.start
    return abs(control.end - control.start - tokens) <= LENGTH_TOLERANCE * tokens


def _window(last: int, sentences: Sequence[Sentence]) -> int | None:
    """First token of the window behind sentence `last`; None where too little of the text is left."""
    first = last + ANCHOR_GAP
    if first >= len(sentences) or sentences[-1].end - sentences[first].start < SHORTEST_WINDOW:
        return None
    return sentences[first].start


def _outcome(trial: Trial, kl: dict[int, Scores], sentences: Sequence[Sentence]) -> Outcome:
    behind = (sentence.text for sentence in sentences if sentence.start >= trial.window)
    window = _words(behind)

    def measured(number: int) -> Measured:
        sentence = sentences[number]
        words = set(_words([sentence.text]))
        overlap = sum(word in words for word in window) / max(1, len(window))
        return Measured(number, effect(kl[number], trial.window), sentence.end - sentence.start, overlap)

    return Outcome(measured(trial.anchor), tuple(map(measured, trial.controls)))


def _words(texts: Iterable[str]) -> list[str]:
    return [word for text in texts for word in _WORD.findall(text.lower())]
