"""The k largest of many scores, the lower index where they are equal."""

import numpy as np

from stream_kernels.cpu_kernel.compiling import jit
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
def kth_largest(work: Ints, count: int, k: int) -> np.int64:
    """The k-th largest of the first `count` distinct numbers in `work`, which is reordered."""
    low, high, target = 0, count - 1, k - 1
    while low < high:
        pivot = work[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while work[i] > pivot:
                i += 1
            while work[j] < pivot:
                j -= 1
            if i <= j:
                work[i], work[j] = work[j], work[i]
                i += 1
                j -= 1
        if target <= j:
            high = j
        elif target >= i:
            low = i
        else:
            break
    found: np.int64 = work[target]
    return found
