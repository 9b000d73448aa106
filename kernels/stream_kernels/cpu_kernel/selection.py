"""The k largest of many scores, the lower index where they are equal."""

import numpy as np

from stream_kernels.compiling import jit
from stream_kernels.cpu_kernel.intrinsics import float_as_int
from stream_kernels.cpu_kernel.structures import MINUS_INFINITY, ZERO, Ints


@jit()
def sort_key(score: np.float32, tie: int) -> np.int64:
    """A sort key: larger for a larger float32 score, and among equal ones for a smaller `tie` (below 2**31)."""
    if not score > MINUS_INFINITY:  # also a NaN: it is never chosen before a number
        score = MINUS_INFINITY
    bits = np.int64(float_as_int(np.float32(score + ZERO)))  # + 0 makes -0 equal to 0
    ordered = bits if bits >= 0 else np.int64(-0x80000000) - bits
    return ordered * np.int64(1 << 31) + (np.int64(0x7FFFFFFF) - tie)


@jit()
def tie_of(key: np.int64) -> int:
    """The `tie` that a sort key was made with."""
    return int(0x7FFFFFFF - (key & np.int64(0x7FFFFFFF)))


@jit()
def least_of_best(keys: Ints, count: int, k: int) -> np.int64:
    """A number that `k` of the first `count` distinct sort keys reach, 1 <= k <= count.

    The range of keys is halved until it is found: counting vectorises, and so takes a sixth of a partition's time.
    """
    low, high = keys[0], keys[0]
    for i in range(count):
        low, high = min(low, keys[i]), max(high, keys[i])
    high += 1
    # From here on k keys or more reach `low`, and fewer reach `high`.
    while True:
        middle: np.int64 = low + (high - low) // 2
        reached = 0
        for i in range(count):
            reached += 1 if keys[i] >= middle else 0
        if reached == k or middle == low:
            return middle
        if reached > k:
            low = middle
        else:
            high = middle
