"""Rows of prompts: host and device mean the same rows, no two of them in one place."""

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from stream_monitor.engine.prompt_rows import MOST_OF_CHUNK, offsets, room, spacing, taken_from, tokens_of

LENGTHS = st.lists(st.one_of(st.just(1), st.integers(1, 100), st.integers(1, 5000)), min_size=1, max_size=20)


@given(lengths=LENGTHS, stride=st.integers(16, 300))
def test_each_row_has_a_place_of_its_own_and_is_inside_its_request(lengths: list[int], stride: int) -> None:
    starts = [0, *accumulate(lengths)]
    tokens = tokens_of(starts, stride)
    places = [token // stride for token in tokens]
    assert len(set(places)) == len(places)
    assert all(place < room(starts[-1], stride) for place in places)
    assert bool(tokens) == bool(taken_from(lengths, stride))
    for begin, length in zip(starts, lengths, strict=False):
        mine = [token for token in tokens if begin <= token < begin + length]
        assert mine == [begin + length - 1 - after for after in offsets(length, stride)]
        assert begin + length - 1 not in mine
        assert len(mine) <= MOST_OF_CHUNK
        assert all(b - a == spacing(length, stride) for a, b in pairwise(mine))
        assert not mine or mine[0] - begin < spacing(length, stride)


def test_without_a_stride_there_are_none() -> None:
    assert room(1000, 0) == taken_from([1000], 0) == 0
