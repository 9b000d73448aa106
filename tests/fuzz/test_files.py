"""Damaged files and rings; an example that fails is shrunk to a seed, and kept by hypothesis."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.files import READERS, Reader, attack, attack_ring

SEEDS = st.integers(0, 1 << 32)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=SEEDS)
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, reader: Reader, seed: int) -> None:
    attack(reader, tmp_path, Random(seed))


@settings(max_examples=400, deadline=None)
@given(seed=SEEDS)
def test_a_ring_of_garbage_ends(seed: int) -> None:
    attack_ring(Random(seed))
