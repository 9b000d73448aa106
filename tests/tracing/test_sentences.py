"""Sentences cover every token once, are cut where the rule says, and know which part of the text they belong to."""

from typing import Any

import pytest

from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.model import TracedModel
from stream_monitor.tracing.sentences import (
    anchor_candidates,
    find_tokens,
    sentence_of_tokens,
    split_sentences,
    token_counts,
    token_texts,
)

TEXT = "What is 3.14 times 2? <think>\nLet me multiply. OK. So it is 6.28.\n\nThat is all</think>It is 6.28, naïve 🦀."


def test_tokens_say_the_text_between_them(tiny_model: TracedModel) -> None:
    ids = tiny_model.tokenizer(TEXT)["input_ids"]
    texts = token_texts(tiny_model.tokenizer, ids)
    assert len(texts) == len(ids) == len(TEXT.encode())
    assert "".join(texts) == TEXT
    assert texts[-5:-1] == ["", "", "", "🦀"], "a character belongs to the token that completes it"


def test_a_tokenizer_that_drops_leading_spaces_loses_none() -> None:
    class Dropping:
        words = ("▁One", "▁two", ".", "▁Three")

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(self.words[number] for number in ids).replace("▁", " ").removeprefix(" ")

    assert token_texts(Dropping(), [0, 1, 2, 3]) == ["One", " two", ".", " Three"]


def test_sentences_are_cut_by_the_rule() -> None:
    sentences = split_sentences(TEXT)
    assert [(one.role, one.text) for one in sentences] == [
        ("prompt", "What is 3.14 times 2? "),
        ("reasoning", "<think>\nLet me multiply."),
        ("reasoning", " OK. So it is 6.28."),
        ("reasoning", "\n\nThat is all</think>"),
        ("answer", "It is 6.28, naïve 🦀."),
    ]


def test_every_token_belongs_to_one_sentence() -> None:
    sentences = split_sentences(["It is", " so. And", " not", " otherwise.", "\n\n", "Right"])
    assert [(one.start, one.end) for one in sentences] == [(0, 4), (4, 6)]
    assert sentence_of_tokens(sentences).tolist() == [0, 0, 0, 0, 1, 1]
    assert token_counts(sentences).tolist() == [4, 2]
    assert "".join(one.text for one in sentences) == "It is so. And not otherwise.\n\nRight"


def test_a_text_is_found_by_its_tokens() -> None:
    texts = ["The key", " is", " 12", "34", ".", " Is 1234?"]
    assert find_tokens(texts, "1234") == (2, 4)
    assert find_tokens(texts, "The") == (0, 1)
    assert find_tokens(texts, "?") == (5, 6)
    for absent in ("4321", ""):
        with pytest.raises(TracingError, match="does not contain"):
            find_tokens(texts, absent)


def test_anchors_are_sought_in_the_reasoning() -> None:
    assert anchor_candidates(split_sentences(TEXT)).tolist() == [False, True, True, True, False]
    assert anchor_candidates(split_sentences(["No tags at all.", " Only text here."])).tolist() == [False, True]
