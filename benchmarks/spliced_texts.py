"""Stretches of recorded reasoning as requests: as they are, with a neutral sentence put in, and joined with another."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.recording import Recorder
from stream_monitor.anchors.sentences import SentenceBuilder, Span
from stream_monitor.records import TokenFlag
from stream_monitor.tracing.texts import Text

SENTENCES = 26
"""Of reasoning in a request."""
CUT = (14, 19)
"""Sentences before what is put in or joined: from, to (the latter not included)."""
NEUTRAL = " Let me pause here for a moment before I go on."
LONGEST_PROMPT = 512
"""Tokens; texts with a longer one are left out, as all requests are to be alike in length."""


@dataclass(frozen=True)
class Stretch:
    """A request: a problem, and reasoning about it.

    Attributes:
        text: name of the trace that it is from.
        problem: number of the problem, traces of one having one number.
        ids: prompt and reasoning; prompt_tokens: of the prompt.
        at: token where what was put in or joined begins; None where nothing was.
    """

    text: str
    problem: int
    ids: list[int]
    prompt_tokens: int
    at: int | None


@dataclass(frozen=True)
class Family:
    """One stretch as it is, with a neutral sentence, and joined with a stretch about another problem; and joined at
    other places with other stretches, for a probe to learn from."""

    calm: Stretch
    neutral: Stretch
    joined: Stretch
    more: tuple[Stretch, ...]


@dataclass(frozen=True)
class _Trace:
    name: str
    problem: int
    prompt: list[int]
    sentences: list[list[int]]

    def windows(self) -> int:
        return len(self.sentences) // SENTENCES

    def window(self, number: int) -> list[list[int]]:
        return self.sentences[number * SENTENCES : (number + 1) * SENTENCES]

    def stretch(self, output: list[int], at: int | None) -> Stretch:
        """The request with this output, in which something begins at token `at`."""
        place = None if at is None else len(self.prompt) + at
        return Stretch(self.name, self.problem, [*self.prompt, *output], len(self.prompt), place)


def families(recorder: Recorder, texts: Sequence[Text], most: int, seed: int, more: int = 0) -> Iterator[Family]:
    """At most `most` of each text, from stretches that do not overlap, and `more` joints of each to learn from; none
    where no other text is long enough to go on with."""
    traces = list(_traces(recorder, texts))
    neutral = recorder.model.tokenizer(NEUTRAL, add_special_tokens=False)["input_ids"]
    for trace in traces:
        others = [other for other in traces if other.problem != trace.problem]
        for number in range(min(most, trace.windows())):
            window, name = trace.window(number), f"{seed} {trace.name} {number}"
            found = _joint(recorder, window, others, name)
            if found is None:
                continue
            (head, tail), rest = found, _joined(window)[len(found.head) :]
            elsewhere = [_joint(recorder, window, others, f"{name} {place}") for place in range(more)]
            yield Family(
                calm=trace.stretch([*head, *rest], None),
                neutral=trace.stretch([*head, *neutral, *rest], len(head)),
                joined=trace.stretch([*head, *tail], len(head)),
                more=tuple(trace.stretch([*one.head, *one.tail], len(one.head)) for one in elsewhere if one),
            )


class _Joint(NamedTuple):
    """Tokens before and behind it."""

    head: list[int]
    tail: list[int]


def _joint(recorder: Recorder, window: list[list[int]], others: Sequence[_Trace], name: str) -> _Joint | None:
    """Drawn by this name; None where no other text is long enough."""
    draw = random.Random(name)
    cut = draw.randrange(*CUT)
    tails = [found for other in others if (found := _tails(recorder, other, SENTENCES - cut))]
    return _Joint(_joined(window[:cut]), _joined(draw.choice(draw.choice(tails)))) if tails else None


def _traces(recorder: Recorder, texts: Sequence[Text]) -> Iterator[_Trace]:
    tokenizer = recorder.model.tokenizer
    problems: dict[str, int] = {}
    for text in texts:
        prompt = tokenizer(text.prompt)["input_ids"]
        if not prompt or len(prompt) > LONGEST_PROMPT:
            continue
        ids = tokenizer(text.reasoning, add_special_tokens=False)["input_ids"]
        spans = _sentences(recorder, ids)
        number = problems.setdefault(text.prompt, len(problems))
        yield _Trace(text.name, number, prompt, [ids[span.start : span.end] for span in spans])


def _sentences(recorder: Recorder, ids: list[int]) -> list[Span]:
    builder = SentenceBuilder(0)
    return [*builder.extend(0, recorder.flags_of(ids)), *builder.finish(len(ids))]


def _tails(recorder: Recorder, other: _Trace, count: int) -> list[list[list[int]]]:
    """Every so many sentences of another trace that begin with white space, so that the first stays a sentence."""
    begins = TokenFlag.BEGINS_SPACE | TokenFlag.BEGINS_NEWLINE
    return [
        other.sentences[place : place + count]
        for place in range(len(other.sentences) - count + 1)
        if recorder.flags_of(other.sentences[place][:1])[0] & begins
    ]


def _joined(sentences: Sequence[Sequence[int]]) -> list[int]:
    return [token for sentence in sentences for token in sentence]
