"""Where an output loops, by its tokens."""

import numpy as np
import pytest

from benchmarks.loops import LONGEST_PERIOD, loop_begins, ngram_repeats
from stream_monitor.anchors.auroc import auroc

TEXT = np.random.default_rng(0).integers(0, 1000, 200).tolist()


@pytest.mark.parametrize("period", [1, 7, 30, LONGEST_PERIOD])
def test_a_loop_is_found_where_it_begins(period: int) -> None:
    output = [*TEXT[:50], *(TEXT[50 : 50 + period] * 400)[:350]]
    assert loop_begins(output) == 50
    assert ngram_repeats(output) is not None
    assert 50 < ngram_repeats(output) <= 50 + 3 * period + 8


def test_what_ends_or_changes_is_noloop_begins() -> None:
    assert loop_begins(TEXT) is None
    assert loop_begins([*TEXT[:50], *TEXT[50:60] * 20, *TEXT[60:]]) is None
    assert loop_begins([*TEXT[:50], *TEXT[50:60] * 4]) is None  # too short to tell
    assert ngram_repeats(TEXT) is None


def test_the_area_counts_ties_half() -> None:
    assert auroc([1.0, 2.0], [1.0, 0.0]) == pytest.approx(0.875)
