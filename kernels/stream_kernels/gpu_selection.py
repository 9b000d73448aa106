"""Choosing the largest of many on a GPU, ties decided in favour of the lower index as the specification wants."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

import triton
import triton.language as tl

from stream_kernels.gpu_keys import logaddexp, logsumexp
from stream_kernels.gpu_structures import Top


@triton.jit
def sortable(scores, among):
    """int32 in the order of float32 `scores`; the smallest int32, below any number, where not `among`."""
    # Minus zero equals zero, but its bits do not.
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(among, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -0x80000000)


@triton.jit
def largest(keys, count):
    """Which of int32 `keys` [N] are the `count` largest, bool [N]; fewer where fewer are above the smallest int32.

    The threshold, the count-th largest key, is found bit by bit from the top.
    """
    threshold = tl.full([], -0x80000000, tl.int32)
    bit = tl.full([], -0x80000000, tl.int32)
    for _ in range(32):
        # In the order of signed numbers the sign bit counts the other way: from the smallest number, xor sets it right.
        higher = threshold ^ bit
        reached = tl.sum((keys >= higher).to(tl.int32), 0)
        threshold = tl.where(reached >= count, higher, threshold)
        bit = (bit >> 1) & 0x7FFFFFFF
    above = keys > threshold
    tied = (keys == threshold) & (keys != -0x80000000)
    room = count - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))


@triton.jit
def empty_top(SHAPE: tl.constexpr):
    """A `Top` of no blocks."""
    return Top(
        tl.full([SHAPE.group_tile, SHAPE.top_tile], float("-inf"), tl.float32),
        tl.full([SHAPE.group_tile, SHAPE.top_tile], 0x7FFFFFFF, tl.int32),
        tl.full([SHAPE.group_tile], float("-inf"), tl.float32),
    )


@triton.jit
def fold(top: Top, lse, key, SHAPE: tl.constexpr):
    """`top` after blocks of masses `lse` and strongest keys `key` [group_tile, top_tile] joined it.

    Where masses are equal the earlier block comes first. Keys name blocks because no two blocks share one.
    """
    old_lse = top.lse
    new = empty_top(SHAPE)
    new_lse = new.lse
    new_key = new.key
    place = tl.arange(0, SHAPE.top_tile)[None, :]
    for k in range(SHAPE.top_k):
        best = tl.maximum(tl.max(old_lse, 1), tl.max(lse, 1))[:, None]
        old_first = tl.min(tl.where(old_lse == best, top.key, 0x7FFFFFFF), 1)
        first = tl.minimum(old_first, tl.min(tl.where(lse == best, key, 0x7FFFFFFF), 1))[:, None]
        found = (place == k) & (best > float("-inf"))
        new_lse = tl.where(found, best, new_lse)
        new_key = tl.where(found, first, new_key)
        old_lse = tl.where(top.key == first, float("-inf"), old_lse)
        lse = tl.where(key == first, float("-inf"), lse)
    left = logaddexp(logsumexp(old_lse, 1), logsumexp(lse, 1))
    return Top(new_lse, new_key, logaddexp(top.rest, left))
