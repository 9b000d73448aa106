"""Long texts to measure on: a needle in prose, prose, code, and recorded reasoning.

Prose and code come from Python's own documentation and library, so that a clone needs nothing else; reasoning traces
are a JSON-lines file given by argument, one object a line with the strings `prompt` and `reasoning`.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from stream_monitor.tracing.texts import read_texts

KINDS = ("needle", "prose", "code", "reasoning")

_NAME = "wandering-otter"
_QUESTION = "What is the special magic number for {name} mentioned in the provided text?"
_ANSWER = " The special magic number for {name} mentioned in the provided text is: {number}"


def token_ids(tokenizer: Any, kind: str, tokens: int, seed: int = 0, traces: Path | None = None) -> list[int]:
    """At most `tokens` token ids of a text, and at least 98% of that.

    Args:
        tokenizer: of Hugging Face transformers; `needle` uses its chat template.
        kind: one of `KINDS`.
        seed: where in its source the text begins, and the needle's depth and number.
        traces: recorded reasoning; needed by `reasoning` alone.

    Raises:
        ValueError: the kind is unknown, or its source is missing or too short.
    """
    if kind == "needle":
        return _needle(tokenizer, tokens, seed)
    if kind == "prose":
        return _fill(tokenizer, prose(seed), tokens)
    if kind == "code":
        return _fill(tokenizer, _code(seed), tokens)
    if kind == "reasoning":
        if traces is None:
            raise ValueError("reasoning traces are not part of the repository: name a file with --traces")
        return _fill(tokenizer, _reasoning(traces, seed), tokens)
    raise ValueError(f"text {kind!r}; valid: {', '.join(KINDS)}")


def _fill(tokenizer: Any, pieces: Iterator[str], tokens: int) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            return ids[:tokens]
    raise ValueError(f"the source holds {len(ids)} tokens; {tokens} are wanted")


def _rotated(items: Sequence[Any], seed: int) -> Sequence[Any]:
    start = random.Random(seed).randrange(len(items)) if seed else 0
    return [*items[start:], *items[:start]]


def prose(seed: int) -> Iterator[str]:
    """Pages of Python's documentation, from one that the seed chooses."""
    for name in _rotated(sorted(topics), seed):
        yield topics[name] + "\n\n"


def _code(seed: int) -> Iterator[str]:
    library = Path(json.__file__).parents[1]
    for path in _rotated(sorted(library.glob("*.py")), seed):
        yield f"# {path.name}\n" + path.read_text(encoding="utf-8", errors="replace") + "\n"


def _reasoning(traces: Path, seed: int) -> Iterator[str]:
    longest_first = sorted(read_texts(traces), key=lambda text: -len(text.reasoning))
    for text in _rotated(longest_first, seed):
        yield text.prompt + text.reasoning + "\n\n"


def needle_prompt(tokenizer: Any, tokens: int, seed: int, depth: float, answer_tokens: int) -> tuple[list[int], str]:
    """A needle prompt of at most `tokens` tokens whose answer is begun, up to the number; and that number.

    Args:
        tokenizer: of Hugging Face transformers, with a chat template.
        seed: of the prose around the needle, and of the number.
        depth: where the needle lies, from 0 to 1.
        answer_tokens: the number has so many digits that it is at least as long, up to 100 digits.

    Raises:
        ValueError: the prompt would be longer.
    """
    draw = random.Random(seed)
    number = str(draw.randrange(1_000_000, 10_000_000))
    # A tokenizer that takes any number for one token must not go on for ever.
    while len(tokenizer(number, add_special_tokens=False)["input_ids"]) < answer_tokens and len(number) < 100:
        number += str(draw.randrange(10))
    before, _, _ = _ANSWER.partition(" {number}")
    return _needle_chat(tokenizer, tokens, seed, depth, number, before.format(name=_NAME)), number


def _needle(tokenizer: Any, tokens: int, seed: int) -> list[int]:
    """A number hidden in prose (mid-way for seed 0), asked for, and the answer given."""
    draw = random.Random(seed)
    number = draw.randrange(1_000_000, 10_000_000)
    depth = draw.uniform(0.1, 0.9) if seed else 0.5
    return _needle_chat(tokenizer, tokens, seed, depth, str(number), _ANSWER.format(name=_NAME, number=number))


def _needle_chat(tokenizer: Any, tokens: int, seed: int, depth: float, number: str, answer: str) -> list[int]:
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    number_ids = tokenizer(number, add_special_tokens=False)["input_ids"]
    hay = _fill(tokenizer, prose(seed), tokens - len(answer_ids) - len(number_ids) - 90)
    at = int(len(hay) * depth)
    text = (
        "A special magic number is hidden within the following text.\n"
        + tokenizer.decode(hay[:at])
        + f" One of the special magic numbers for {_NAME} is: {number}. "
        + tokenizer.decode(hay[at:])
        + "\n"
        + _QUESTION.format(name=_NAME)
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = [*chat["input_ids"], *answer_ids]
    if len(ids) > tokens:
        raise ValueError(f"the needle prompt has {len(ids)} tokens, more than {tokens}")
    return ids
