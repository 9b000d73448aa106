"""Where sentences begin and end."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_monitor.anchors.sentences import MAX_TOKENS, MIN_TOKENS, SentenceBuilder, Span, coarsen, prompt_sentences
from stream_monitor.records import Role, TokenFlag

STOP, SPACE, INSIDE, NEWLINE, OPENS, CLOSES, _, STARTS_LINE = (1 << bit for bit in range(8))
WORDS = bytes([SPACE] * 5)


def cut(flags: bytes) -> list[tuple[int, int]]:
    """Spans of a text given at once."""
    builder = SentenceBuilder(0)
    return [(span.start, span.end) for span in builder.extend(0, flags) + builder.finish(len(flags))]


def test_the_flags_are_those_of_the_contract() -> None:
    assert [int(flag) for flag in TokenFlag] == [1 << bit for bit in range(8)]


@pytest.mark.parametrize(
    ("flags", "spans"),
    [
        (WORDS + bytes([STOP, SPACE]) + WORDS, [(0, 6), (6, 12)]),
        # "3.14": no white space after the terminator.
        (WORDS + bytes([STOP, 0]) + WORDS, [(0, 12)]),
        (WORDS + bytes([INSIDE]) + WORDS, [(0, 6), (6, 11)]),
        (WORDS + bytes([NEWLINE, NEWLINE | STARTS_LINE]) + WORDS, [(0, 6), (6, 12)]),
        (WORDS + bytes([NEWLINE]) + WORDS, [(0, 11)]),
        # "No. " is too short and merges into the next.
        (bytes([SPACE, STOP]) + WORDS + bytes([STOP, SPACE]) + WORDS, [(0, 8), (8, 14)]),
        (b"", []),
    ],
)
def test_boundaries(flags: bytes, spans: list[tuple[int, int]]) -> None:
    assert cut(flags) == spans


@pytest.mark.parametrize("together", [True, False])
def test_the_number_of_an_item_stays_with_it(together: bool) -> None:
    """ "Let me list the steps:\\n1. Add two and two.\\n12. Halve it all now." with a token for every word and digit."""
    word, digit, stop, newline = 2, 0, 1, 8 | 128 | 2
    flags = bytes(
        [word] * 4 + [0, newline, digit, stop] + [word] * 4 + [stop, newline, digit, digit, stop] + [word] * 4
    )
    builder = SentenceBuilder(0)
    runs = [flags] if together else [flags[place : place + 1] for place in range(len(flags))]
    found, first = [], 0
    for run in runs:
        found += builder.extend(first, run)
        first += len(run)
    found += builder.finish(len(flags))
    assert [(span.start, span.end) for span in found] == [(0, 6), (6, 13), (13, 21)]


def test_reasoning_tags_cut_and_change_the_role() -> None:
    flags = bytes([OPENS]) + WORDS + bytes([CLOSES]) + bytes([0]) + WORDS
    builder = SentenceBuilder(0)
    assert builder.extend(0, flags) == [Span(0, 7, Role.REASONING)]
    assert builder.finish(13) == [Span(7, 13, Role.ANSWER)]


def test_without_tags_all_is_reasoning() -> None:
    builder = SentenceBuilder(0)
    assert {span.role for span in builder.extend(0, (WORDS + bytes([STOP])) * 5)} == {Role.REASONING}


def test_tokens_seen_before_are_skipped_and_gaps_counted() -> None:
    builder = SentenceBuilder(0)
    builder.extend(0, WORDS)
    assert builder.extend(2, WORDS[:3] + bytes([STOP, SPACE])) == [Span(0, 6, Role.REASONING)]
    assert builder.extend(0, WORDS) == []
    assert builder.extend(10, WORDS) == []
    assert builder.missing == 3
    assert builder.extend(15 + MAX_TOKENS + 1, WORDS) == [Span(6, 15 + MAX_TOKENS + 1, Role.REASONING)]


def test_a_text_without_stops_is_cut() -> None:
    spans = cut(bytes([SPACE]) * (MAX_TOKENS * 3))
    assert max(end - start for start, end in spans) == MAX_TOKENS


@given(st.binary(max_size=300), st.lists(st.integers(1, 20), max_size=30))
def test_pieces_cover_the_text_and_do_not_depend_on_how_it_arrives(flags: bytes, sizes: list[int]) -> None:
    whole = cut(flags)
    builder, spans, at = SentenceBuilder(0), [], 0
    for size in [*sizes, len(flags)]:
        spans += builder.extend(at, flags[at : at + size])
        at = min(len(flags), at + size)
    spans += builder.finish(len(flags))
    assert [(span.start, span.end) for span in spans] == whole
    assert [position for start, end in whole for position in range(start, end)] == list(range(len(flags)))
    tagged = {i for i, f in enumerate(flags) if f & (OPENS | CLOSES)}
    for start, end in whole[:-1]:
        assert end - start >= MIN_TOKENS or {start, start - 1, end, end - 1} & tagged


def test_no_sentence_of_a_prompt_crosses_a_role() -> None:
    flags = (WORDS + bytes([STOP])) * 4
    spans = prompt_sentences(24, np.array([0, 9], np.uint32), np.array([1, 2], np.uint8), flags)
    assert spans == [Span(0, 6, 1), Span(6, 9, 1), Span(9, 12 + 6, 2), Span(18, 24, 2)]


def test_a_prompt_of_unknown_roles_is_still_cut() -> None:
    none = np.zeros(0, np.uint32)
    assert prompt_sentences(12, none, none.astype(np.uint8), (WORDS + bytes([STOP])) * 2) == [
        Span(0, 6, 0),
        Span(6, 12, 0),
    ]
    assert prompt_sentences(0, none, none.astype(np.uint8), b"") == []


def test_coarsening_keeps_roles_and_cover() -> None:
    spans = [Span(i, i + 1, i // 500) for i in range(1000)]
    joined = coarsen(spans, 64)
    assert len(joined) <= 66
    assert (joined[0].start, joined[-1].end) == (0, 1000)
    assert all(a.end == b.start for a, b in pairwise(joined))
