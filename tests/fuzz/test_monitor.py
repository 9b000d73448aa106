"""A minute against a real monitor; `benchmarks.fuzz` takes ten. A failure names the seed that brings it back."""

import time
from collections.abc import Iterator
from itertools import count
from random import Random

import pytest

from tests.fuzz.attacks import ATTACKS
from tests.fuzz.target import Target

SECONDS = 8.0
"""Of each attack."""
WARM_UP_SECONDS = 4.0
"""Of each attack before memory is measured: what stays once filled (caches, event log, allocator) is not growth."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(tmp_path_factory.mktemp("fuzz"))
    yield target
    target.close()


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_monitor_lives_refuses_by_name_and_serves_others(target: Target, attack: str) -> None:
    begun, warm = time.monotonic(), False
    for seed in count():
        if time.monotonic() - begun > WARM_UP_SECONDS + SECONDS:
            break
        if not warm and time.monotonic() - begun > WARM_UP_SECONDS:
            target.settled()
            warm = True
        try:
            ATTACKS[attack](target, Random(seed))
            if seed % 100 == 0:
                target.serves()
        except Exception as error:
            raise AssertionError(f"{attack}, seed {seed}: {error}\n{target.process.log.read_text()[-2000:]}") from error
    print("GROWN", target.check() >> 20)
