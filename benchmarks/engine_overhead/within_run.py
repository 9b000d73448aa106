"""What a captured step costs, from one run alone: its steps with rows against its steps without, milliseconds apart.

Neither where a process's memory lies nor what else the machine does has a part in it, so that it resolves a tenth of a
percent where runs differ by some percent. What the plug-in costs in steps without rows is not in it.
"""

import statistics
from itertools import pairwise
from typing import Any

LEAST_STRIDE = 4
"""Below it no step is free of rows and of the search for those of the step before."""


def steps_over_quiet_ones(result: dict[str, Any]) -> float | None:
    """Time between tokens over that of quiet steps, which have no rows and do not follow one with rows: of medians.

    Args:
        result: of `Engine.run`; `steps`, engine steps that the plug-in had counted before; `stride`.

    Returns:
        None where it cannot be told: nothing captured, a shorter stride, or prompts read in several steps.
    """
    stamps, stride = result["stamps"][0], result["stride"]
    if stride < LEAST_STRIDE or len(result["schedule"]) != len(stamps):
        return None
    by_place: dict[int, list[float]] = {}
    # The first token comes with step `steps` + 1, and the first gap ends with the step after it.
    for step, (before, after) in enumerate(pairwise(stamps), result["steps"] + 2):
        by_place.setdefault(step % stride, []).append(after - before)
    if len(by_place) < stride:
        return None
    medians = {place: statistics.median(gaps) for place, gaps in by_place.items()}
    quiet = statistics.fmean(median for place, median in medians.items() if place > 1)
    return statistics.fmean(medians.values()) / quiet
