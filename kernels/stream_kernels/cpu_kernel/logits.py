"""From keys in the tile to logits, and from logits to masses.

A mass is kept as its largest logit (`peak`) and the sum of exponentials relative to it (`weight`), so that no
exponential overflows.
"""

import math

import numpy as np

from stream_kernels.compiling import jit
from stream_kernels.cpu_kernel.intrinsics import LANES, dot_columns, float_as_int, int_as_float, larger
from stream_kernels.cpu_kernel.structures import MINUS_INFINITY, ZERO, Floats, Scratch

# Sums may be reordered, so that they vectorise; infinities keep their meaning.
_REORDER = {"reassoc", "contract", "nsz"}

_dot_32_columns_of_two = dot_columns(4, 2)
_dot_32_columns = dot_columns(4, 1)
_dot_8_columns = dot_columns(1, 1)

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts: the first has few enough bits that a product with a whole number up to 127 is exact.
_LN_2_HIGH = np.float32(0.693359375)
_LN_2_LOW = np.float32(-2.12194440e-4)
_HALF = np.float32(0.5)
_EXP_FLOOR = np.float32(-87.0)
"""exp of less is not a normal float32; it is taken to be 1.6e-38."""
_C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(n)) for n in range(2, 7))
_ONE = np.float32(1)
_THREE_QUARTERS = np.int32(0x3F400000)
_L1, _L2, _L3 = np.float32(3.3333331174e-1), np.float32(-2.4999993993e-1), np.float32(2.0000714765e-1)
_L4, _L5, _L6 = np.float32(-1.6668057665e-1), np.float32(1.4249322787e-1), np.float32(-1.2420140846e-1)
_L7, _L8, _L9 = np.float32(1.1676998740e-1), np.float32(-1.1514610310e-1), np.float32(7.0376836292e-2)


@jit()
def score_keys(s: Scratch, heads: int, count: int, head_dim: int, softcap: np.float32) -> None:
    """s.logits[h, t] = s.query[h] . s.tile[:, t], capped, for the first `heads` heads and `count` columns.

    Columns up to the next multiple of LANES are scored as well, on whatever the tile holds there.
    """
    score_columns(s, heads, count, head_dim, softcap, s.tile.ctypes.data, 4 * s.tile.shape[1])


@jit()
def score_columns(
    s: Scratch, heads: int, count: int, head_dim: int, softcap: np.float32, source: int, row_bytes: int
) -> None:
    """The same of float32 columns at an address, a channel every `row_bytes`."""
    queries, logits = s.query.ctypes.data, s.logits.ctypes.data
    query_bytes, logits_bytes = 4 * s.query.shape[1], 4 * s.logits.shape[1]
    column = 0
    while column < count:
        h, at = 0, source + 4 * column
        if count - column > 3 * LANES:
            while h < heads:
                query, target = queries + h * query_bytes, logits + h * logits_bytes + 4 * column
                if h + 1 < heads:
                    _dot_32_columns_of_two(query, query_bytes, at, row_bytes, head_dim, target, logits_bytes)
                    h += 2
                else:
                    _dot_32_columns(query, query_bytes, at, row_bytes, head_dim, target, logits_bytes)
                    h += 1
            column += 4 * LANES
        else:
            while h < heads:
                query, target = queries + h * query_bytes, logits + h * logits_bytes + 4 * column
                _dot_8_columns(query, query_bytes, at, row_bytes, head_dim, target, logits_bytes)
                h += 1
            column += LANES
    if softcap > ZERO:
        cap_logits(s.logits, heads, count, softcap)


@jit(fastmath={"contract"})
def _split_exp(x: np.float32) -> tuple[np.float32, np.float32]:
    """For float32 x <= 0 a power of two p and a small e with exp(x) = p * (1 + e), to 2e-7 relative.

    In a loop it vectorises, which the library's exp does not.
    """
    x = max(x, _EXP_FLOOR)
    whole = np.floor(x * _LOG2_E + _HALF)
    f = (x - whole * _LN_2_HIGH) - whole * _LN_2_LOW
    excess = f * (_ONE + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return int_as_float(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))), excess


@jit(fastmath={"contract"})
def exp_below_zero(x: np.float32) -> np.float32:
    """exp(x) for float32 x <= 0."""
    power, excess = _split_exp(x)
    return (_ONE + excess) * power


@jit(fastmath={"contract"})
def log_of(x: np.float32) -> np.float32:
    """Logarithm of a normal float32 x > 0, to 1e-7 or two units in the last place. In a loop it vectorises.

    x = 2**e * (1 + f) with 1 + f from 0.75 to 1.5; the polynomial in f is that of the Cephes library's logf.
    """
    bits = np.int32(float_as_int(x))
    e = np.int32((bits - _THREE_QUARTERS) >> np.int32(23))
    f = int_as_float(np.int32(bits - (e << np.int32(23)))) - _ONE
    square = f * f
    tail = _L1 + f * (_L2 + f * (_L3 + f * (_L4 + f * (_L5 + f * (_L6 + f * (_L7 + f * (_L8 + f * _L9)))))))
    whole = np.float32(e)
    found: np.float32 = f + (tail * f * square - _HALF * square + whole * _LN_2_LOW) + whole * _LN_2_HIGH
    return found


@jit(fastmath={"contract"})
def cap_logits(logits: Floats, heads: int, count: int, cap: np.float32) -> None:
    """Replaces each logit x by cap * tanh(x / cap), in the first `heads` rows and `count` columns.

    With m = exp(-2y) - 1, tanh(y) = -m / (2 + m). The 1 is subtracted from the power of two alone, which is exact, so
    that small logits keep their precision.
    """
    twice = np.float32(-2) / cap
    for h in range(heads):
        for t in range(count):
            power, excess = _split_exp(abs(logits[h, t]) * twice)
            m = power * excess + (power - _ONE)
            logits[h, t] = math.copysign(cap * m / (np.float32(2) + m), logits[h, t])


@jit()
def largest(values: Floats, count: int) -> np.float32:
    """The largest of the first `count` values, -inf if there is none; no finite key gives a NaN."""
    peak = MINUS_INFINITY
    for t in range(count):
        peak = larger(peak, values[t])
    return peak


@jit(fastmath=_REORDER)
def weight_above(values: Floats, count: int, peak: np.float32) -> np.float32:
    """Sum of exp(value - peak) over the first `count` values."""
    total = ZERO
    for t in range(count):
        total += exp_below_zero(values[t] - peak)
    return total


@jit()
def add_mass(left: Floats, head: int, peak: np.float32, weight: np.float32) -> None:
    """Adds weight * exp(peak) to a head's (peak, weight) in `left` [n, 2]."""
    if weight == ZERO or peak == MINUS_INFINITY:
        return
    if peak <= left[head, 0]:
        left[head, 1] += weight * exp_below_zero(peak - left[head, 0])
    else:
        left[head, 1] = left[head, 1] * exp_below_zero(left[head, 0] - peak) + weight
        left[head, 0] = peak


@jit()
def first_equal(values: Floats, count: int, wanted: np.float32) -> int:
    """Place of the first of the first `count` values that is `wanted`; without a branch it vectorises."""
    found = np.int32(count)
    for t in range(count):
        found = min(found, np.int32(t) if values[t] == wanted else np.int32(count))
    return int(found) if found < count else 0


@jit(fastmath=_REORDER)
def weighted_sum(values: Floats, weights: Floats, count: int, slope: np.float32, origin: np.float32) -> np.float32:
    """Sum of weight * exp(slope * (value - origin)) over `count` values, none with a weight above `origin`."""
    total = ZERO
    for i in range(count):
        total += weights[i] * exp_below_zero(min(ZERO, slope * (values[i] - origin)))
    return total


@jit()
def raise_to(target: Floats, values: Floats, count: int, less: np.float32) -> None:
    """target[i] = max(target[i], values[i] - less)."""
    for i in range(count):
        target[i] = max(target[i], values[i] - less)


@jit(fastmath={"contract"})
def add_exponentials(target: Floats, values: Floats, peaks: Floats, count: int, less: np.float32) -> None:
    """target[i] += exp(values[i] - less - peaks[i]), where that is at most 1."""
    for i in range(count):
        target[i] += exp_below_zero(values[i] - less - peaks[i])
