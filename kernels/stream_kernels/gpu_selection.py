"""Choosing the largest of many on a GPU, ties decided in favour of the lower index as the specification wants."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

import triton
import triton.language as tl

from stream_kernels.gpu_keys import logaddexp, logsumexp
from stream_kernels.gpu_structures import Top, TopScratch


@triton.jit
def sortable(scores, among):
    """int32 in the order of float32 `scores`; the smallest int32, below any number, where not `among`."""
    # Minus zero equals zero, but its bits do not.
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(among, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -0x80000000)


@triton.jit
def largest(keys, count):
    """Which of int32 `keys` [N] are the `count` largest, bool [N]; fewer where fewer are above the smallest int32.

    The threshold, the count-th largest key, is found bit by bit from the top, as far as needed to part them.
    """
    threshold = tl.full([], -0x80000000, tl.int32)
    bit = tl.full([], -0x80000000, tl.int32)
    going = bit != 0
    while going:
        # In the order of signed numbers the sign bit counts the other way: from the smallest number, xor sets it right.
        higher = threshold ^ bit
        reached = tl.sum((keys >= higher).to(tl.int32), 0)
        threshold = tl.where(reached >= count, higher, threshold)
        bit = (bit >> 1) & 0x7FFFFFFF
        going = (bit != 0) & (reached != count)
    above = keys > threshold
    tied = (keys == threshold) & (keys != -0x80000000)
    room = count - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))


@triton.jit
def _places(SHAPE: tl.constexpr):
    """Where a unit's blocks are in a `TopScratch`, [group_tile, 2 * top_tile]."""
    head = tl.arange(0, SHAPE.group_tile)[:, None]
    return head * (2 * SHAPE.top_tile) + tl.arange(0, 2 * SHAPE.top_tile)[None, :]


@triton.jit
def clear_top(scratch: TopScratch, SHAPE: tl.constexpr):
    """No blocks so far; log-sum-exp of those that fell out, [group_tile]."""
    at = _places(SHAPE)
    tl.store(scratch.lse + at, tl.full(at.shape, float("-inf"), tl.float32))
    tl.store(scratch.key + at, tl.full(at.shape, 0x7FFFFFFF, tl.int32))
    return tl.full([SHAPE.group_tile], float("-inf"), tl.float32)


@triton.jit
def new_blocks(scratch: TopScratch, lse, key, SHAPE: tl.constexpr):
    """Puts blocks of masses `lse` and strongest keys `key` [group_tile, top_tile] behind the heaviest so far.

    Returns:
        `lse` as it was, spread over the program's threads anew: a product leaves it to few of them.
    """
    head = tl.arange(0, SHAPE.group_tile)[:, None]
    at = head * (2 * SHAPE.top_tile) + SHAPE.top_tile + tl.arange(0, SHAPE.top_tile)[None, :]
    tl.debug_barrier()
    tl.store(scratch.lse + at, lse)
    tl.store(scratch.key + at, tl.where(lse == float("-inf"), 0x7FFFFFFF, key))
    tl.debug_barrier()
    return tl.load(scratch.lse + at)


@triton.jit
def keep_heaviest(scratch: TopScratch, rest, SHAPE: tl.constexpr):
    """Of the heaviest blocks so far and those of `new_blocks` keeps the heaviest `top_k`, in order.

    Where masses are equal the earlier block comes first. Keys name blocks because no two blocks share one.

    Returns:
        `rest` [group_tile], log-sum-exp of what fell out before, joined by what falls out now.
    """
    SOME: tl.constexpr = min(16, 2 * SHAPE.top_tile)
    at = _places(SHAPE)
    column = tl.arange(0, 2 * SHAPE.top_tile)
    lse = tl.load(scratch.lse + at)
    key = tl.load(scratch.key + at)
    rank = tl.full(at.shape, 0, tl.int32)
    for first in range(0, 2 * SHAPE.top_tile, SOME):
        other = first + tl.arange(0, SOME)
        there = tl.arange(0, SHAPE.group_tile)[:, None] * (2 * SHAPE.top_tile) + other[None, :]
        their_lse = tl.load(scratch.lse + there)[:, None, :]
        their_key = tl.load(scratch.key + there)[:, None, :]
        earlier = (their_key < key[:, :, None]) | (
            (their_key == key[:, :, None]) & (other[None, None, :] < column[None, :, None])
        )
        ahead = (their_lse > lse[:, :, None]) | ((their_lse == lse[:, :, None]) & earlier)
        rank += tl.sum(ahead.to(tl.int32), 2)
    tl.debug_barrier()
    to = tl.arange(0, SHAPE.group_tile)[:, None] * (2 * SHAPE.top_tile) + rank
    out = rank >= SHAPE.top_k
    tl.store(scratch.lse + to, tl.where(out, float("-inf"), lse))
    tl.store(scratch.key + to, tl.where(out, 0x7FFFFFFF, key))
    return logaddexp(rest, logsumexp(tl.where(out, lse, float("-inf")), 1))


@triton.jit
def load_top(scratch: TopScratch, rest, SHAPE: tl.constexpr):
    """The heaviest blocks as a `Top`."""
    head = tl.arange(0, SHAPE.group_tile)[:, None]
    column = tl.arange(0, SHAPE.top_tile)[None, :]
    at = head * (2 * SHAPE.top_tile) + column
    tl.debug_barrier()
    return Top(tl.load(scratch.lse + at), tl.load(scratch.key + at), rest)


@triton.jit
def own_top(scratch: TopScratch, program, SHAPE: tl.constexpr):
    """The part of the working memory that belongs to a program."""
    place = program * (SHAPE.group_tile * 2 * SHAPE.top_tile)
    return TopScratch(scratch.lse + place, scratch.key + place)
