"""Block summaries as they travel: row by row, masses as logarithms of their shares, in float16."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import cached_jit, jit
from stream_kernels.cpu_kernel.intrinsics import float_as_int, int_as_float
from stream_kernels.cpu_kernel.structures import MINUS_INFINITY, Floats, Ints, Summary

_MOST_NARROW = 0xFFFE
"""Largest block id that fits in 16 bits; all bits set say that there is no block, in either width."""

_INFINITY = 0x7F800000
_TOO_LARGE, _SUBNORMAL = 0x477FF000, 0x38800000
"""Bits of the least float32 that float16 rounds to infinity, and of the least that is not subnormal there."""
_REBIAS = (127 - 15) << 23
_HALF, _HALF_BITS = np.float32(0.5), 0x3F000000


class PackedRows(NamedTuple):
    """What is written, row after row; shapes as in `BlockSummary`, rows first, and the bits of float16 as uint16.

    Attributes:
        ids, narrow_ids: uint32 and uint16 [R, L, H, K], the same ids; the latter cut off where they do not fit.
        shares: uint16 [R, L, H, K], of the kept blocks. forced_shares: uint16 [R, L, H, F].
        strongest: uint8 [R, L, H, K]. forced_strongest: uint8 [R, L, H, F].
        unobserved, sink_shares: uint16 [R, L, H].
        total: float32 [R, L, H], logarithm of the row's softmax denominator.
        keys_read: float32 [R, L].
    """

    ids: NDArray[np.uint32]
    narrow_ids: NDArray[np.uint16]
    shares: NDArray[np.uint16]
    strongest: NDArray[np.uint8]
    forced_shares: NDArray[np.uint16]
    forced_strongest: NDArray[np.uint8]
    unobserved: NDArray[np.uint16]
    sink_shares: NDArray[np.uint16]
    total: Floats
    keys_read: Floats


@cached_jit()
def pack_rows(summary: Summary, keep: Ints, packed: PackedRows) -> tuple[bool, bool]:
    """Write rows `keep` of a summary; row `keep[n]` becomes row n.

    Returns whether all their block ids fit in 16 bits, and whether any of their heads has a learned sink.
    """
    ids, lse, strongest, forced_lse, forced_strongest, unobserved, learned_sink, keys_read = summary
    narrow, sinks = True, False
    for n in range(len(keep)):
        for layer in range(ids.shape[0]):
            packed.keys_read[n, layer] = keys_read[layer, keep[n]]
            for head in range(ids.shape[2]):
                own, to = (layer, keep[n], head), (n, layer, head)
                sinks |= learned_sink[own] > MINUS_INFINITY
                total = _total(lse[own], forced_lse[own], unobserved[own], learned_sink[own])
                packed.total[to] = total
                packed.unobserved[to] = to_float16(unobserved[own] - total)
                packed.sink_shares[to] = to_float16(learned_sink[own] - total)
                for k in range(ids.shape[3]):
                    block = ids[own][k]
                    narrow &= block <= _MOST_NARROW
                    packed.ids[to][k] = block
                    packed.narrow_ids[to][k] = block & 0xFFFF
                    packed.shares[to][k] = to_float16(lse[own][k] - total)
                    packed.strongest[to][k] = strongest[own][k]
                for f in range(forced_lse.shape[3]):
                    packed.forced_shares[to][f] = to_float16(forced_lse[own][f] - total)
                    packed.forced_strongest[to][f] = forced_strongest[own][f]
    return narrow, sinks


@jit()
def _total(lse: Floats, forced_lse: Floats, unobserved: np.float32, learned_sink: np.float32) -> np.float32:
    """As `BlockSummary.total_lse`, of one row, layer and head."""
    peak = max(unobserved, learned_sink)
    for part in lse:
        peak = max(peak, part)
    for part in forced_lse:
        peak = max(peak, part)
    if not math.isfinite(peak):
        return peak
    weight = math.exp(unobserved - peak) + math.exp(learned_sink - peak)
    for part in lse:
        weight += math.exp(part - peak)
    for part in forced_lse:
        weight += math.exp(part - peak)
    return np.float32(peak + math.log(weight))


@jit()
def to_float16(value: np.float32) -> int:
    """The bits of a float32 rounded to float16, ties to even; without the instruction for it, which not every machine
    that code is compiled for has."""
    bits: int = float_as_int(value)
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if size >= _INFINITY:
        return sign | 0x7C00 | (0x200 if size > _INFINITY else 0)
    if size >= _TOO_LARGE:
        return sign | 0x7C00
    if size < _SUBNORMAL:
        # The last place of 0.5 is worth what the last place of a subnormal float16 is.
        places: int = float_as_int(int_as_float(np.int32(size)) + _HALF) - _HALF_BITS
        return sign | places
    return sign | ((size + 0xFFF + ((size >> 13) & 1) - _REBIAS) >> 13)
