"""The soak's eyes: it sees a wrong attribution, and its rounds are what they claim."""

import random

import numpy as np
import pytest

from benchmarks.soak.checks import Comparison, Reference
from benchmarks.soak.traffic import NEW_TOKENS, REQUESTS, make_round
from stream_monitor.v1alpha1 import monitor_pb2

PROMPT, SENTENCE = 24, 6
TOKENS = list(range(18))


def trace(targets: list[int], texts: list[str], counts: int = 2, first_row: int = 0) -> monitor_pb2.GetTraceResponse:
    """Four sentences of a prompt, then one of the output for each target, which it looks at from `counts` rows, every
    second one from its token `first_row` on."""
    made = monitor_pb2.GetTraceResponse()
    made.info.prompt_tokens, made.info.output_tokens = PROMPT, SENTENCE * len(targets)
    made.info.state = monitor_pb2.REQUEST_STATE_FINISHED
    for index, text in enumerate(["?"] * 4 + texts):
        made.sentences.add(index=index, first_token=SENTENCE * index, end_token=SENTENCE * (index + 1), text=text)
    rows = np.arange(4, 4 + len(targets), dtype="<u4")
    made.matrix_row, made.matrix_column = rows.tobytes(), np.array(targets, "<u4").tobytes()
    made.matrix_share = np.full(len(targets), 0.6, "<f4").tobytes()
    made.captured_rows = np.array([0] * 4 + [counts] * len(targets), "<u4").tobytes()
    inside = SENTENCE * rows[:, None] + first_row + 2 * np.arange(counts)
    made.row_positions = inside.astype("<u4").tobytes()
    return made


OWN = Reference(TOKENS, [trace([2, 2, 3], list("abc"), first_row=1), trace([1, 2, 3], list("abc"))])
OTHER = Reference(TOKENS, [trace([3, 3, 1], list("xyz"))])


def held(found: monitor_pb2.GetTraceResponse, tokens: list[int] = TOKENS, text: str = "abc") -> Comparison:
    compared = Comparison()
    compared.hold(found, tokens, OWN, OTHER, text)
    return compared


def test_a_trace_of_its_own_prompt_is_right() -> None:
    compared = held(trace([1, 2, 3], ["a", "b", "c"]))
    assert (compared.distances, compared.texts, compared.wrong) == ([0, 0, 0], 1, 0)
    assert compared.others == [1, 1, 0]


@pytest.mark.parametrize(
    ("targets", "text", "wrong"), [([3, 3, 1], "abc", 3), ([1, 2, 1], "abc", 1), ([1, 2, 3], "abd", 1)]
)
def test_rows_or_text_of_another_request_are_seen(targets: list[int], text: str, wrong: int) -> None:
    assert held(trace(targets, list(text))).wrong == wrong


def test_sentences_are_compared_as_far_as_the_tokens_agree_and_no_row_is_missing() -> None:
    assert len(held(trace([1, 2, 3], ["a", "b", "c"]), [*TOKENS[:13], 99]).distances) == 2
    assert held(trace([1, 2, 3], ["a", "b", "c"], counts=1)).distances == []


def test_rows_at_other_positions_are_held_against_as_many_and_told_apart() -> None:
    compared = held(trace([2, 2, 1], ["a", "b", "c"], first_row=2))
    assert (compared.distances, compared.apart, compared.wrong) == ([], [0, 0, 1], 1)
    assert held(trace([2, 2, 3], ["a", "b", "c"], first_row=1)).distances == [0, 0, 0]


def test_a_request_whose_beginning_was_not_seen_has_other_sentences_and_is_not_compared() -> None:
    late = trace([1, 2, 3], ["a", "b", "c"])
    late.sentences[1].first_token = 0
    del late.sentences[0]
    assert held(late).distances == []


def test_a_share_that_is_no_number_is_wrong() -> None:
    broken = trace([1, 2, 3], ["a", "b", "c"])
    broken.matrix_share = np.array([np.nan, 0.6, 0.6], "<f4").tobytes()
    assert held(broken).wrong == 1


def test_a_round_mixes_lengths_has_one_request_ended_and_uses_its_ids_again() -> None:
    draw = random.Random(0)
    first, second = make_round(draw, 6), make_round(draw, 6)
    assert [each.request_id for each in first] == [each.request_id for each in second]
    assert first != second
    assert sum(each.abort_at is not None for each in first) == 1
    assert len(first) == REQUESTS
    assert all(0 < each.max_tokens <= NEW_TOKENS for each in first)
