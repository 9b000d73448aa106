"""Penalised logistic regression: a weight for each of many numbers, from few examples."""

import numpy as np

from stream_monitor.anchors.matrix import Mass

_LEAST_SPREAD = 0.1
"""Of the median standard deviation: what hardly varied among the examples must not decide, when it does elsewhere."""
_STEPS = 25
"""Of Newton's method, which a penalised logistic regression needs ten of."""


def logistic_regression(shown: Mass, true: Mass, weight: Mass, penalty: float) -> tuple[Mass, float]:
    """Weights, float64 [m], and bias of the log odds.

    Args:
        shown: float64 [n, m].
        true: float64 [n], 0 or 1.
        weight: float64 [n], sum 1: what each example counts in the mean loss.
        penalty: of the squares of the weights of what is shown, standardised (what hardly varies, as if it did by a
            tenth of what is usual); beside the mean loss.
    """
    centre = shown.mean(0)
    spread = shown.std(0)
    spread = np.maximum(spread, max(_LEAST_SPREAD * np.median(spread), 1e-9))
    points = np.column_stack([(shown - centre) / spread, np.ones(len(shown))])
    penalties = np.append(np.full(shown.shape[1], 2 * penalty), 1e-9)
    found = np.zeros(points.shape[1])
    for _ in range(_STEPS):
        odds = 1 / (1 + np.exp(-points @ found))
        slope = points.T @ (weight * (odds - true)) + penalties * found
        curvature = (points.T * (weight * odds * (1 - odds))) @ points + np.diag(penalties)
        found -= np.linalg.solve(curvature, slope)
    weights = found[:-1] / spread
    return weights, float(found[-1] - weights @ centre)
