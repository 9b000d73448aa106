"""Sentences of a traced text, as spans of its tokens.

Source of the rule: thought-anchors cuts after `.`, `?`, `!` followed by white space and at blank lines, and merges
pieces under 10 characters into the next. It reads only what stands between reasoning tags; here every token belongs to
a sentence, and reasoning with its tags is cut from what stands around it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stream_monitor.tracing.errors import TracingError

SentenceRole = Literal["prompt", "reasoning", "answer"]

MIN_CHARACTERS = 10
"""A shorter piece merges into the next (thought-anchors)."""

_BOUNDARY = re.compile(r"[.?!](?=\s)|\n[^\S\n]*\n\s*")
OPENING, CLOSING = "<think>", "</think>"
_TAG = re.compile(f"{OPENING}|{CLOSING}")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding leaves of a character whose other bytes are in later tokens."""
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8, so the most tokens that one character is spread over."""


@dataclass(frozen=True)
class Sentence:
    """Tokens [start, end) and what they say.

    `role` is `prompt` up to a `<think>` tag, `reasoning` up to the closing one, `answer` behind it; a text without tags
    is all prompt.
    """

    start: int
    end: int
    role: SentenceRole
    text: str


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, so that all joined are the text.

    A token is decoded behind its predecessors, as some tokenizers drop a leading space otherwise. One that ends within
    a character adds nothing; the token that completes the character adds it whole.
    """
    texts = []
    context, done = 0, 0  # decoding starts at `context`; tokens before `done` are accounted for
    for end in range(1, len(ids) + 1):
        before = _decoded(tokenizer, ids[context:done])
        after = _decoded(tokenizer, ids[context:end])
        if after.endswith(_UNFINISHED) and end - done < _LONGEST_CHARACTER and end < len(ids):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        context, done = done, end
    return texts


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def split_sentences(texts: Iterable[str]) -> list[Sentence]:
    """Sentences of the tokens whose texts are given; a token belongs to the sentence in which it begins.

    >>> [(s.start, s.end, s.text) for s in split_sentences(["It", " must", " be", " seven", ".", " Wait", ", why?"])]
    [(0, 5, 'It must be seven.'), (5, 7, ' Wait, why?')]
    """
    pieces = list(texts)
    text = "".join(pieces)
    tags = {tag.start() if tag.group() == OPENING else tag.end(): tag.group() for tag in _TAG.finditer(text)}
    cuts = [0]
    for cut in sorted({*tags, *(found.end() for found in _BOUNDARY.finditer(text))}):
        short = cut - cuts[-1] < MIN_CHARACTERS
        if short and cut in tags and cuts[-1] and cuts[-1] not in tags:
            cuts[-1] = cut  # what is short before a tag joins its predecessor
        elif not short or cut in tags:
            cuts.append(cut)
    begins = np.array(list(accumulate(map(len, pieces), initial=0))[:-1])
    # Cuts inside one token leave a sentence without tokens, which is none.
    firsts = np.unique(np.searchsorted(begins, cuts, side="left"))
    firsts = np.unique([0, *firsts[firsts < len(pieces)]]) if pieces else firsts[:0]
    return [
        Sentence(start, end, _role(int(begins[start]), tags), "".join(pieces[start:end]))
        for start, end in pairwise([*map(int, firsts), len(pieces)])
    ]


def _role(place: int, tags: Mapping[int, str]) -> SentenceRole:
    """Of what begins at character `place`, given where tags cut."""
    before = [tag for cut, tag in tags.items() if cut <= place]
    if not before:
        return "prompt"
    return "reasoning" if before[-1] == OPENING else "answer"


def anchor_candidates(sentences: Sequence[Sentence]) -> NDArray[np.bool_]:
    """Which sentences may be anchors, bool [S]: those of the reasoning, as in thought-anchors.

    Without reasoning tags all but the first: the first tokens of a text are where heads rest that have nothing to look
    for, whatever they say, and a head that rests is peaked too.
    """
    reasoning = np.array([sentence.role == "reasoning" for sentence in sentences])
    return reasoning if reasoning.any() else np.arange(len(sentences)) > 0


def sentence_of_tokens(sentences: Sequence[Sentence]) -> NDArray[np.int64]:
    """Number of the sentence that each token belongs to, int64 [T]."""
    return np.repeat(np.arange(len(sentences)), token_counts(sentences))


def token_counts(sentences: Sequence[Sentence]) -> NDArray[np.int64]:
    """Tokens of each sentence, int64 [S]."""
    return np.array([sentence.end - sentence.start for sentence in sentences], np.int64)


def find_tokens(texts: Sequence[str], wanted: str) -> tuple[int, int]:
    """Tokens [start, end) that hold the first occurrence of `wanted`.

    Raises:
        TracingError: it does not occur.
    """
    place = "".join(texts).find(wanted) if wanted else -1
    if place < 0:
        raise TracingError(f"the context does not contain {wanted!r}")
    ends = list(accumulate(map(len, texts)))
    start = int(np.searchsorted(ends, place, side="right"))
    last = int(np.searchsorted(ends, place + len(wanted), side="left"))
    return start, last + 1
