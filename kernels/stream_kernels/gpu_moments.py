"""The regression of exact block masses on their estimates, on a GPU: `reference_beam.Regression`, as blocks come in."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

import triton
import triton.language as tl

from stream_kernels.gpu_structures import Fit, Moments


@triton.jit
def no_moments(SHAPE: tl.constexpr):
    """`Moments` of no points."""
    none = tl.full([SHAPE.group_tile], 0.0, tl.float32)
    return Moments(tl.full([], 0.0, tl.float32), none, none, none, none, none)


@triton.jit
def join_moments(old: Moments, x, y, among, count):
    """`old` joined by the `count` points of x, y [group_tile, N] that are `among` [1, N].

    Deviations are summed from each part's own mean and then moved, so that nothing is lost to cancellation.
    """
    count = count.to(tl.float32)
    x = tl.where(among, x, 0.0)
    y = tl.where(among, y, 0.0)
    mean_x = tl.sum(x, 1) / count
    mean_y = tl.sum(y, 1) / count
    dx = tl.where(among, x - mean_x[:, None], 0.0)
    dy = tl.where(among, y - mean_y[:, None], 0.0)
    total = old.count + count
    step_x = mean_x - old.mean_x
    step_y = mean_y - old.mean_y
    both = old.count * count / total
    return Moments(
        total,
        old.mean_x + step_x * (count / total),
        old.mean_y + step_y * (count / total),
        old.xx + tl.sum(dx * dx, 1) + step_x * step_x * both,
        old.xy + tl.sum(dx * dy, 1) + step_x * step_y * both,
        old.yy + tl.sum(dy * dy, 1) + step_y * step_y * both,
    )


@triton.jit
def fit_line(moments: Moments, SHAPE: tl.constexpr):
    """`Regression.fit`."""
    slope = tl.minimum(tl.maximum(moments.xy / tl.maximum(moments.xx, 1e-6), 0.0), 1.0)
    around = moments.yy - slope * (2.0 * moments.xy - slope * moments.xx)
    residual = tl.minimum(tl.maximum(around / tl.maximum(moments.count, 1.0), 0.0), SHAPE.max_residual)
    return Fit(moments.mean_x, moments.mean_y, slope, residual)


@triton.jit
def _median(fit: Fit, x):
    return fit.centre_y[:, None] + fit.slope[:, None] * (x - fit.centre_x[:, None])


@triton.jit
def predicted_mean(fit: Fit, x):
    """`Regression.mean` at x [group_tile, N]."""
    return _median(fit, x) + 0.5 * fit.residual[:, None]


@triton.jit
def expected_excess(fit: Fit, x, threshold, unit):
    """`Regression.expected_excess` at x [group_tile, N]; threshold and unit are [group_tile]."""
    deviation = tl.sqrt(tl.maximum(fit.residual, 1e-4))[:, None]
    median = _median(fit, x)
    distance = (median - threshold[:, None]) / deviation
    above = tl.exp(median + 0.5 * deviation * deviation - unit[:, None]) * _normal_cdf(distance + deviation)
    below = tl.exp(threshold - unit)[:, None] * _normal_cdf(distance)
    return tl.maximum(above - below, 0.0)


@triton.jit
def _normal_cdf(x):
    """`statistics.normal_cdf`."""
    return 1.0 / (1.0 + tl.exp(-1.702 * x))
