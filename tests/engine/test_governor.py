"""The sampling rate follows the measured cost, down and up again."""

import pytest

from stream_monitor.engine.governor import _WINDOW_STEPS, MAX_FACTOR, Governor

STEP_NS = 10_000_000


class Clock:
    """Steps of 10 ms, of which hooks take a share."""

    def __init__(self, governor: Governor) -> None:
        self.governor, self.now = governor, 1

    def window(self, share: float) -> int:
        for _ in range(_WINDOW_STEPS):
            self.governor.add("before_step", int(share * STEP_NS))
            self.now += STEP_NS
            self.governor.next_step(self.now)
        return self.governor.factor


def test_the_stride_doubles_while_the_cost_is_too_high_and_is_bounded():
    clock = Clock(Governor(0.01))
    assert clock.window(0.009) == 1
    assert [clock.window(0.02) for _ in range(8)] == [2, 4, 8, 16, 32, 64, MAX_FACTOR, MAX_FACTOR]
    assert clock.governor.overhead == pytest.approx(0.02, rel=0.02)


def test_it_falls_again_only_where_the_higher_rate_would_fit():
    clock = Clock(Governor(0.01))
    clock.window(0.02)
    assert clock.window(0.006) == 2, "twice that is too much"
    assert clock.window(0.003) == 1


def test_idle_time_between_steps_does_not_make_the_cost_look_small():
    governor = Governor(0.01)
    now = 1
    for _ in range(_WINDOW_STEPS):
        governor.add("before_step", 30_000_000)
        now += 3600 * 10**9
        governor.next_step(now)
    assert governor.factor == 2


def test_a_search_without_a_cpu_of_its_own_counts():
    clock = Clock(Governor(0.01))
    clock.governor.add_shared(0.03 * _WINDOW_STEPS * STEP_NS / 1e9)
    assert clock.window(0.0) == 2
    assert clock.window(0.0) == 1, "each second once"


def test_a_bound_of_0_never_changes_the_rate():
    assert Clock(Governor(0.0)).window(0.5) == 1
