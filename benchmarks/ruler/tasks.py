"""RULER's tasks, made anew from their published definitions.

A task hides what it asks for in a haystack of any size: repeated noise sentences, prose (Python's documentation), more
needles, or a list of words. What follows is the answer's beginning, which stands after the chat template, so that the
model has only to go on. Questions, noise and word lists are our own. `niah_multikey_3` and the two question-answering
tasks, whose data a clone does not have, are left out.
"""

import random
import re
import string
import sys
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, cycle, islice, takewhile
from math import pi
from pydoc_data.topics import topics
from typing import Any, Literal

from benchmarks.texts import prose

_FILLED = 0.95
"""Least share of the tokens wanted that a prompt and its answer's budget take."""

_DEPTHS = 40
"""Places, evenly over prose, that its needles are drawn from."""

_NOISE = (
    "Rain ran down the window.",
    "A clock ticked in the hall.",
    "Somewhere a door fell shut.",
    "The kettle had begun to sing.",
    "Nobody in the house said a word.",
)
_NEEDLE = "Remember this: one of the secret codes of {key} is {value}."
_ADJECTIVES = (
    "amber ancient balmy bitter blunt brave breezy brisk calm candid clever cosmic crimson curly dapper distant "
    "dusty eager early faint fancy fierce frosty gentle giddy golden grand hasty hollow humble icy idle jolly keen "
    "late lean little lively lofty lucky mellow merry mighty misty modest narrow noble odd pale patient placid "
    "proud quaint quiet rapid rare royal rustic shiny silent silver sleepy slender solemn spare stormy sturdy "
    "subtle sunny tender tidy velvet vivid warm wicked wild windy young zesty"
)
_NOUNS = (
    "acorn anchor apron badger barrel basket beacon bridge bucket button candle canyon castle cellar comet copper "
    "cradle dagger desert drum eagle ember falcon feather fiddle forest garden glacier hammer harbor hazel island "
    "ivory jacket kernel kettle ladder lantern lemon magnet maple meadow mirror needle nickel orchard otter paddle "
    "pebble pepper pillow pirate planet pocket puddle quarry rabbit ribbon river saddle sailor shadow spider statue "
    "stove temple thistle ticket timber tunnel turnip valley violin walnut wagon whistle willow window wizard "
    "zipper"
)

_HOPS = 4
"""Variables that take their value from another."""

_COMMON = 10
"""Common words of a list."""

_LONG = 4_096
"""Tokens from which the lists of common words repeat their words more often."""


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        ids: its tokens, the answer begun.
        references: what the answer must name.
        budget: most tokens to decode.
    """

    ids: list[int]
    references: tuple[str, ...]
    budget: int


@dataclass(frozen=True)
class Draft:
    """A task whose haystack has no size yet.

    Attributes:
        text: gives the user's message by size, in units of at least a token; nothing else of it changes.
        answer: how the answer begins.
        references: what it must name.
        smallest, largest: sizes from and up to which it can be made.
    """

    text: Callable[[int], str]
    answer: str
    references: tuple[str, ...]
    smallest: int
    largest: int = sys.maxsize


def make(tokenizer: Any, task: str, tokens: int, seed: int, number: int) -> Sample:
    """The prompt of this number, which takes at most `tokens` tokens with its answer's budget, and 95% of them or more.

    Args:
        tokenizer: of Hugging Face transformers, with a chat template.
        task: one of `TASKS`.

    Raises:
        ValueError: that is too short for the task, or too long for its words; or there is no chat template.
    """
    draft = TASKS[task](random.Random(f"{task}/{seed}/{number}"), tokens)
    answer = tokenizer(draft.answer, add_special_tokens=False)["input_ids"]
    named = tokenizer(", ".join(draft.references), add_special_tokens=False)["input_ids"]
    # As much again for what the model puts between the names, and some for an end of its own.
    budget = 2 * len(named) + 8

    def ids(size: int) -> list[int]:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": draft.text(size)}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return [*chat["input_ids"], *answer]

    sizes = range(draft.smallest, min(draft.largest, tokens) + 1)
    fitting = bisect_right(sizes, tokens - budget, key=lambda size: len(ids(size)))
    if not fitting:
        raise ValueError(f"{task} does not fit into {tokens:,} tokens")
    found = ids(sizes[fitting - 1])
    if len(found) + budget < _FILLED * tokens:
        raise ValueError(f"{task} has words for {len(found) + budget:,} tokens; {tokens:,} are wanted")
    return Sample(found, draft.references, budget)


def score(answer: str, references: Sequence[str]) -> float:
    """Share of `references` in `answer`, whatever their case; control characters count as ends of lines."""
    clean = re.sub(r"[\x00-\x1f]", "\n", answer).lower()
    return sum(reference.lower() in clean for reference in references) / len(references)


def _number(draw: random.Random) -> str:
    return str(draw.randrange(1_000_000, 10_000_000))


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _niah(
    draw: random.Random,
    _: int,
    hay: Literal["noise", "prose", "needles"],
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
    value: Callable[[random.Random], str] = _number,
) -> Draft:
    """Codes of `keys` keys, `values` of each, in a haystack; those of the first `asked` keys are wanted."""
    names = [f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]
    draw.shuffle(names)
    codes = {name: [value(draw) for _ in range(values)] for name in names[:keys]}
    needles = [_NEEDLE.format(key=name, value=code) for name, some in codes.items() for code in some]
    if hay == "prose":
        hidden = _in_prose(draw, needles)
    else:
        rest = [_NEEDLE.format(key=name, value=value(draw)) for name in names[keys:]] if hay == "needles" else _NOISE
        hidden = _in_lines(rest, needles, [draw.random() for _ in needles])
    references = tuple(code for name in names[:asked] for code in codes[name])
    listed = " and ".join(filter(None, (", ".join(names[: asked - 1]), names[asked - 1])))
    several = len(references) > 1
    subject = f"secret code{'s' if several else ''} of {listed}"
    verb = "are" if several else "is"

    def text(size: int) -> str:
        return (
            "Secret codes stand somewhere in the text below. Take note of them: you will be asked for some.\n\n"
            f"{hidden(size)}\n\nWhat {verb} the {subject}? Name {'all that the text holds' if several else 'it'}."
        )

    largest = len(rest) if hay == "needles" else sys.maxsize
    return Draft(text, f"The {subject}, as the text says, {verb}", references, smallest=5, largest=largest)


def _in_prose(draw: random.Random, needles: Sequence[str]) -> Callable[[int], str]:
    """So many words of prose, with each needle before one of its sentences, in any order."""
    words = [word for page in prose(draw.randrange(1_000_000)) for word in page.split()]
    depths = [place / (_DEPTHS - 1) for place in draw.sample(range(_DEPTHS), len(needles))]

    def text(size: int) -> str:
        some = list(islice(cycle(words), size))
        starts = [0, *(place for place, word in enumerate(some, 1) if word[-1] in ".?!")]
        return " ".join(_mixed(some, needles, [starts[bisect_right(starts, depth * size) - 1] for depth in depths]))

    return text


def _in_lines(lines: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> Callable[[int], str]:
    """So many of `lines`, repeated as needed, with the needles as lines of their own at `depths`, 0 to 1."""
    return lambda size: "\n".join(_mixed(islice(cycle(lines), size), needles, [int(d * (size + 1)) for d in depths]))


def _mixed(units: Iterable[str], needles: Sequence[str], places: Sequence[int]) -> list[str]:
    """`units`, each needle before the unit of its place; those of one place stay in order."""
    mixed = list(units)
    for place, number in sorted(zip(places, range(len(needles)), strict=True), reverse=True):
        mixed.insert(place, needles[number])
    return mixed


def _vt(draw: random.Random, _: int) -> Draft:
    """A number handed from variable to variable, in noise; all five are wanted. An example comes first."""
    names = list(dict.fromkeys(_letters(draw, string.ascii_uppercase, 5) for _ in range(4 * _HOPS)))
    numbers = draw.sample(range(10_000, 100_000), 2)
    parts = []
    for number in numbers:
        chain = [names.pop() for _ in range(_HOPS + 1)]
        given = [str(number), *(f"VAR {name}" for name in chain)]
        needles = [f"VAR {name} = {value}" for name, value in zip(chain, given, strict=False)]
        parts.append((chain, _in_lines(_NOISE, needles, sorted(draw.random() for _ in needles))))
    (shown, example), (references, hidden) = parts

    def question(number: int, lines: str) -> str:
        return (
            "Variables are set somewhere in the text below, some to the value of another.\n\n"
            f"{lines}\n\nWhich {_HOPS + 1} variables have the value {number}, directly or by way of others?"
        )

    def answer(number: int) -> str:
        return f"The {_HOPS + 1} variables that have the value {number} are:"

    def text(size: int) -> str:
        solved = f"{question(numbers[0], example(2 * len(_NOISE)))}\n{answer(numbers[0])} {', '.join(shown)}"
        return f"{solved}\n\n{question(numbers[1], hidden(size))}"

    return Draft(text, answer(numbers[1]), tuple(references), smallest=len(_NOISE))


def _cwe(draw: random.Random, tokens: int) -> Draft:
    """A numbered list in which ten words come more often than the others; an example comes first."""
    words = list(_vocabulary())
    draw.shuffle(words)
    common, shown, rest = words[:_COMMON], words[_COMMON : 2 * _COMMON], words[2 * _COMMON :]
    # A common word inside another one would be found in an answer that does not name it.
    rest = [word for word in rest if not any(inner in word for inner in common)]
    often, seldom = (30, 3) if tokens >= _LONG else (6, 1)
    layout = draw.getrandbits(64)
    answer = f"The {_COMMON} words that come most often are:"

    def question(often: int, common: list[str], seldom: int, rest: list[str]) -> str:
        listed = often * common + seldom * rest
        random.Random(layout).shuffle(listed)
        lines = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return f"Some words come more often than others in this list.\n{lines}\nWhich {_COMMON} come most often?"

    def text(size: int) -> str:
        solved = f"{question(3, shown, 1, rest[-_COMMON:])}\n{answer} {', '.join(shown)}"
        return f"{solved}\n\n{question(often, common, seldom, rest[:size])}"

    return Draft(text, answer, tuple(common), smallest=1, largest=len(rest) - _COMMON)


@cache
def _vocabulary() -> list[str]:
    """Plain words of Python's documentation."""
    return sorted({word for page in topics.values() for word in re.findall(r"(?<![\w'.-])[a-z]{4,10}(?![\w'-])", page)})


def _fwe(draw: random.Random, _: int) -> Draft:
    """Coded words whose counts fall with the square of their rank; the first is dots, the next three are wanted."""
    coded = list(dict.fromkeys(_letters(draw, string.ascii_lowercase, 6) for _ in range(1_000)))
    layout = draw.getrandbits(64)

    def text(size: int) -> str:
        counts = (round(size / (rank * rank * pi * pi / 6)) for rank in count(1))
        listed = [
            word for word, times in zip(["...", *coded], takewhile(bool, counts), strict=False) for _ in range(times)
        ]
        random.Random(layout).shuffle(listed)
        return (
            f"Below is a text in code, with dots for what could not be read.\n\n{' '.join(listed)}\n\n"
            "Which three words in code come most often? Leave the dots aside."
        )

    # From 80 words on no two of the first ranks have the same count.
    return Draft(text, "The three words in code that come most often are:", tuple(coded[:3]), smallest=80)


def _letters(draw: random.Random, letters: str, length: int) -> str:
    return "".join(draw.choices(letters, k=length))


TASKS: dict[str, Callable[[random.Random, int], Draft]] = {
    "niah_single_1": partial(_niah, hay="noise"),
    "niah_single_2": partial(_niah, hay="prose"),
    "niah_single_3": partial(_niah, hay="prose", value=_uuid),
    "niah_multikey_1": partial(_niah, hay="prose", keys=4),
    "niah_multikey_2": partial(_niah, hay="needles"),
    "niah_multivalue": partial(_niah, hay="prose", values=4),
    "niah_multiquery": partial(_niah, hay="prose", keys=4, asked=4),
    "vt": _vt,
    "cwe": _cwe,
    "fwe": _fwe,
}
"""Drafts of a task by its name, from a random source and the tokens wanted."""
