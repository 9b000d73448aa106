"""Rounding to float16 in the compiled packing: bit for bit numpy's."""

import numba
import numpy as np
from numpy.typing import NDArray

from stream_kernels.cpu_kernel.packing import to_float16


@numba.njit  # Compiled code alone can call it.
def rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    found = np.empty(len(values), np.uint16)
    for place in range(len(values)):
        found[place] = to_float16(values[place])
    return found


def test_every_float32_is_rounded_as_numpy_rounds_it() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = halves[np.isfinite(halves)]
    ties = (finite[:-1] + finite[1:]) / 2
    drawn = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint32).view(np.float32)
    edges = np.array([np.inf, -np.inf, 65519.996, 65520.0, -0.0, 6.1e-5, 5.9e-8, 2.9e-8, -1e-30], np.float32)
    with np.errstate(over="ignore"):
        for values in (halves, ties, np.nextafter(ties, np.float32(0)), drawn, edges):
            numbers = values[~np.isnan(values)]
            assert np.array_equal(rounded(numbers), numbers.astype(np.float16).view(np.uint16))
    assert np.isnan(rounded(np.array([np.nan, -np.nan], np.float32)).view(np.float16)).all()
