"""`stream-monitor validate`: are attention anchors causal for this model, on these texts?"""

import sys
from collections.abc import Sequence
from math import exp, isfinite
from pathlib import Path

from stream_monitor.tracing.causal import TextResult, measure_text
from stream_monitor.tracing.causal_statistics import (
    Figure,
    figure,
    handicapped_share,
    higher_share,
    median_ratio,
    outcomes,
    pairs,
    share_of_exact,
)
from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.model import load
from stream_monitor.tracing.texts import evenly, read_texts

_MEANING = """\
What it means: on texts like these, what the masks call an anchor is a sentence that later predictions of this model
depend on {verdict} one of about the same length.
What it does not mean: nothing is said of a single anchor, of other texts, or of whether an answer would turn out
otherwise. A hidden sentence can still act through what was written, or computed, before it was hidden: an effect is
that of not being able to look back. ANCHOR_SHIFT is not tested here."""


def run(model_name: str, path: Path, count: int, tokens: int, seed: int = 0) -> None:
    """Runs the causal test and prints what came out.

    Args:
        model_name: folder of a Hugging Face model, or its name.
        path: texts, see `read_texts`.
        count: most texts, taken evenly from the file.
        tokens: longest part of a text that is read.
        seed: of the resamples.

    Raises:
        TracingError: something that was given cannot be used, or no text has an anchor that can be tried.
    """
    texts = evenly(read_texts(path), count)
    model = load(model_name)
    found = []
    for number, text in enumerate(texts, 1):
        found.append(measure_text(model, *text.tokens(model, tokens)))
        print(f"text {number} of {len(texts)}: {len(found[-1].kept)} anchors tried", file=sys.stderr, flush=True)
    print(result(model_name, found, seed))


def result(model_name: str, texts: Sequence[TextResult], seed: int) -> str:
    """The result in plain words.

    Raises:
        TracingError: there is none.
    """
    tried = len(list(outcomes(texts, "kept")))
    if not tried:
        raise TracingError(
            "no text has an anchor with controls of its length and enough text behind them: give longer texts, "
            "or a larger --tokens"
        )
    ratio = figure(texts, median_ratio("kept"), seed)
    higher = figure(texts, higher_share("kept"), seed)
    later = figure(texts, handicapped_share("kept"), seed)
    exact, of_exact = higher_share("exact")(texts), share_of_exact(texts)
    beside = f"; anchors by exact attention {exact:.0%}" if isfinite(exact) else ""
    beside += f" (ratio {of_exact:.2f})" if isfinite(of_exact) else ""
    lines = [
        f"{model_name}: {tried} anchors in {len(texts)} texts, {len(list(pairs(texts, 'kept')))} pairs with a control",
        f"hiding an anchor changes later predictions {exp(ratio.value):.2f} times as much as hiding a control "
        f"(median; 95% interval {exp(ratio.low):.2f} to {exp(ratio.high):.2f}; 1 is no difference)",
        f"the anchor has the larger effect in {higher.value:.0%} of the pairs ({higher.low:.0%} to {higher.high:.0%}); "
        f"chance 50%{beside}",
        _MEANING.format(verdict=_verdict(ratio)),
    ]
    if isfinite(later.value):
        nearer = f"{later.value:.0%} ({later.low:.0%} to {later.high:.0%})"
        lines.insert(3, f"where the control is the later of the two, and so nearer to what is predicted: {nearer}")
    if len(texts) < 5:
        lines.append(f"Only {len(texts)} texts: the intervals are too narrow.")
    return "\n".join(lines)


def _verdict(ratio: Figure) -> str:
    if ratio.low > 0:
        return "more than on"
    if ratio.high < 0:
        return "less than on"
    return "no more, as far as can be told, than on"
