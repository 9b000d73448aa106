"""A minute against a real monitor; `benchmarks.fuzz` takes ten. A failure names the seed that brings it back."""

import time
from collections.abc import Iterator
from itertools import count
from random import Random

import pytest

from tests.fuzz.attacks import ATTACKS
from tests.fuzz.target import Target

SECONDS = 12.0
"""Of each attack."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(tmp_path_factory.mktemp("fuzz"))
    yield target
    target.close()


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_monitor_lives_refuses_by_name_and_serves_others(target: Target, attack: str) -> None:
    for seed in range(40):
        ATTACKS[attack](target, Random(seed))
    target.settled()
    begun = time.monotonic()
    for seed in count():
        if time.monotonic() - begun > SECONDS:
            break
        try:
            ATTACKS[attack](target, Random(seed))
            if seed % 100 == 0:
                target.serves()
        except Exception as error:
            raise AssertionError(f"{attack}, seed {seed}: {error}\n{target.process.log.read_text()[-2000:]}") from error
    target.check()
