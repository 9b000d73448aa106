"""The texts that benchmarks measure on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.texts import KINDS, needle_prompt, token_ids


class Words:
    """A tokenizer of one token a word, with the white space before it."""

    def __init__(self) -> None:
        self._pieces: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        pieces = re.findall(r"\s*\S+|\s+$", text)
        return {"input_ids": [self._pieces.setdefault(piece, len(self._pieces)) for piece in pieces]}

    def decode(self, ids: list[int]) -> str:
        pieces = list(self._pieces)
        return "".join(pieces[token] for token in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return self("".join(message["content"] for message in messages), add_special_tokens=False)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    path = tmp_path / "traces.jsonl"
    rows = [{"prompt": f"Question {i}? ", "reasoning": f"Step {i}. " * 400} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


TOKENS = 5_000


@pytest.mark.parametrize("kind", KINDS)
def test_texts_have_the_length_asked_for(kind: str, traces: Path) -> None:
    length = len(token_ids(Words(), kind, TOKENS, 0, traces))
    assert 0.98 * TOKENS <= length <= TOKENS
    assert kind == "needle" or length == TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_texts_depend_on_the_seed_alone(kind: str, traces: Path) -> None:
    def made(seed: int) -> str:
        tokenizer = Words()
        return tokenizer.decode(token_ids(tokenizer, kind, TOKENS, seed, traces))

    assert made(0) == made(0)
    assert made(3) == made(3)
    assert made(0) != made(3)


def test_the_needle_is_hidden_asked_for_and_answered() -> None:
    tokenizer = Words()
    text = tokenizer.decode(token_ids(tokenizer, "needle", TOKENS))
    number = text.rsplit(None, 1)[-1]
    assert len(number) == 7
    assert text.count(number) == 2
    assert 0.4 < text.index(number) / len(text) < 0.6


class Digits(Words):
    """The same, but a digit is a token."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        pieces = re.findall(r"\d|\s*[^\s\d]+|\s+", text)
        return {"input_ids": [self._pieces.setdefault(piece, len(self._pieces)) for piece in pieces]}


@pytest.mark.parametrize(("tokenizer", "digits"), [(Digits(), 16), (Words(), 100)])
@pytest.mark.parametrize("depth", [0.1, 0.9])
def test_a_needle_prompt_ends_before_a_number_of_so_many_tokens(depth: float, tokenizer: Words, digits: int) -> None:
    ids, number = needle_prompt(tokenizer, TOKENS, 3, depth, 16)
    assert len(number) == digits
    text = tokenizer.decode(ids)
    assert 0.98 * TOKENS <= len(ids) <= TOKENS
    assert text.count(number) == 1
    assert depth - 0.1 < text.index(number) / len(text) < depth + 0.1
    assert text.endswith("mentioned in the provided text is:")


def test_reasoning_needs_its_traces() -> None:
    with pytest.raises(ValueError, match="--traces"):
        token_ids(Words(), "reasoning", 100)


def test_an_unknown_text_and_a_source_that_is_too_short_are_refused(traces: Path) -> None:
    with pytest.raises(ValueError, match="valid: needle, prose, code, reasoning"):
        token_ids(Words(), "poetry", 100)
    with pytest.raises(ValueError, match="the source holds"):
        token_ids(Words(), "reasoning", 10_000_000, 0, traces)
