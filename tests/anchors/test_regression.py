"""The penalised logistic regression against a general minimiser."""

import numpy as np
import pytest
from scipy.optimize import minimize

from stream_monitor.anchors.regression import logistic_regression

PENALTY = 0.03


def test_the_regression_is_the_one_it_says() -> None:
    draw = np.random.default_rng(0)
    shown, true = draw.normal(-3, 2, (60, 5)), draw.integers(0, 2, 60).astype(float)
    weight = draw.uniform(0.5, 1.5, 60)
    weight /= weight.sum()
    points = (shown - shown.mean(0)) / shown.std(0)

    def loss(of: np.ndarray) -> float:
        odds = points @ of[:-1] + of[-1]
        return float(weight @ np.logaddexp(0, np.where(true, -odds, odds)) + PENALTY * (of[:-1] ** 2).sum())

    best = minimize(loss, np.zeros(6), tol=1e-12).x
    weights, bias = logistic_regression(shown, true, weight, PENALTY)
    np.testing.assert_allclose(weights * shown.std(0), best[:-1], atol=1e-5)
    assert bias + weights @ shown.mean(0) == pytest.approx(best[-1], abs=1e-5)


def test_what_hardly_varies_among_the_examples_does_not_decide_elsewhere() -> None:
    """A head that read nothing in any of them would else be worth thousands of another one's, once it reads."""
    draw = np.random.default_rng(0)
    true = np.repeat([0.0, 1.0], 30)
    shown = draw.normal(0, 1, (60, 5))
    shown[:, 0] += true
    shown[:, 4] = 1e-6 * (true + draw.normal(0, 1, 60))
    weights, _ = logistic_regression(shown, true, np.full(60, 1 / 60), PENALTY)
    assert weights[0] > 0.3
    assert abs(weights[4]) < 0.01
    without, _ = logistic_regression(shown[:, :4], true, np.full(60, 1 / 60), PENALTY)
    np.testing.assert_allclose(weights[:4], without, atol=0.05)
