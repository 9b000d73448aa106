"""Statistics standardised by what is usual, and a profile made of requests of which some heads matter."""

from itertools import product

import numpy as np
import pytest

from stream_monitor.anchors.calibration import Served, calibrated, receivers_of
from stream_monitor.anchors.panel import Kind, Panel
from stream_monitor.anchors.reference import ALL, LEAST, Reference, Stratum, measure
from stream_monitor.records import Role
from tests.anchors.shares import head_shares

PROMPT = 10
HEADS = [(3, 0), (3, 1), (3, 2), (3, 3)]
RECEIVER = 2
"""The head that looks at one sentence of the prompt; the others look anywhere."""


def test_values_are_compared_with_their_stratum() -> None:
    generator = np.random.default_rng(0)
    few, many = Stratum.of(2, 40, Role.REASONING), Stratum.of(8, 40, Role.REASONING)
    values = [(few, value) for value in generator.normal(5, 2, 400)] + [
        (many, v) for v in generator.normal(1, 0.5, 400)
    ]
    reference = Reference(measure(values))
    assert reference.standardise(5.0, few) == pytest.approx(0, abs=0.2)
    assert reference.standardise(2.0, many) == pytest.approx(2, abs=0.3)
    # One that was hardly ever seen: all of them together stand for it.
    rare = Stratum.of(8, 40, Role.ANSWER)
    assert reference.standardise(np.mean([value for _, value in values]), rare) == pytest.approx(0)
    assert Reference({}).standardise(7.0, few) == 0


def test_a_stratum_needs_values() -> None:
    stratum = Stratum.of(4, 20, Role.REASONING)
    assert measure([(stratum, 1.0)] * (LEAST - 1)) == {}
    assert set(measure([(stratum, 1.0)] * LEAST)) == {stratum.name, ALL}


def test_strata_differ_by_rows_support_and_phase() -> None:
    names = {Stratum.of(*one).name for one in product((2, 4, 6, 20), (5, 20, 100, 5000), (Role.REASONING, Role.ANSWER))}
    assert len(names) == 32


def served(seed: int, moves_at: int | None = None) -> Served:
    """A request whose receiver looks at sentence 3, from `moves_at` on at sentence 7; the other heads drift."""
    generator = np.random.default_rng(seed)
    size = PROMPT + 40
    shares = []
    for index in range(PROMPT, size):
        target = 3 if moves_at is None or index < moves_at else 7
        entries = [(RECEIVER, target, 0.4), (RECEIVER, int(generator.integers(0, index - 4)), 0.05)]
        for head in (0, 1, 3):
            entries += [(head, int(column), 0.1) for column in generator.integers(0, index - 4, 5)]
        head, column, mass = (np.array(part) for part in zip(*entries, strict=True))
        shares.append((index, head_shares(head, column, mass)))
    roles = np.array([Role.USER] * PROMPT + [Role.REASONING] * (size - PROMPT), np.uint8)
    return Served(PROMPT, HEADS, roles, 12 * np.arange(size), np.full(size, 4), shares, lock=0.1)


def test_a_profile_weighs_the_receiver_and_finds_what_it_shows() -> None:
    # Peaked over sentences of the output is what makes a receiver: these look at one of them, as they look at 3.
    calm = [served(seed) for seed in range(120)]
    profile = calibrated("m", "c", 1, calm)
    # No head is peaked over the output's sentences, so none can be told from the others with certainty.
    assert profile.highest["anchor_lock"] == (0.1,) * 120
    assert set(profile.references) == {"anchor_shift", "prompt_detachment"}
    raised = 0
    for seed in range(500, 540):
        panel = Panel(profile, 0.05)
        alarms = [
            alarm for seen in served(seed, PROMPT + 20).observations(profile.receivers) for alarm in panel.update(seen)
        ]
        raised += any(alarm.kind is Kind.ANCHOR_SHIFT for alarm in alarms)
    assert raised >= 36
    others = [
        any(
            alarm.kind is Kind.ANCHOR_SHIFT
            for seen in served(seed).observations(profile.receivers)
            for alarm in panel.update(seen)
        )
        for seed in range(1000, 1100)
        for panel in [Panel(profile, 0.05)]
    ]
    assert np.mean(others) <= 0.08


def test_receivers_come_from_the_sentences_of_the_output() -> None:
    """A head that keeps looking at one sentence of the output is peaked there; one of the prompt does not count."""

    def looking(seed: int) -> Served:
        one = served(seed)
        shares = []
        for index, found in one.shares:
            columns = found.columns.copy()
            if index > PROMPT + 12:
                columns[(found.heads == RECEIVER) & (found.columns == 3)] = PROMPT + 5
            shares.append((index, found._replace(columns=columns)))
        return Served(one.prompt, one.heads, one.roles, one.starts, one.rows, shares, one.lock)

    found = receivers_of([looking(seed) for seed in range(20)])
    assert found.heads == ((3, RECEIVER),)
    assert found.reliability > 0.9
