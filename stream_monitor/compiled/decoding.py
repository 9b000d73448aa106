"""Rows as they come in a message -> keys and mass of each."""

import numpy as np
from numpy.typing import NDArray

from stream_kernels.compiling import checked_jit
from stream_monitor.compiled.periods import LEAST_LAG, MOST_LAG

Bits = NDArray[np.uint16]
"""Of float16 logarithms of shares."""

SOUND, OUTSIDE, UNSOUND = 0, 1, 2
"""What `decode_rows` says."""
SINK_TOKENS = 4
"""First tokens that are no far key of a loop: the attention sink is there, whatever is read."""


@checked_jit()
def decode_rows(
    positions: NDArray[np.int64],
    block_size: int,
    ids: NDArray[np.uint32],
    strongest: NDArray[np.uint8],
    log_share: Bits,
    forced_ids: NDArray[np.int64],
    forced_strongest: NDArray[np.uint8],
    forced_log_share: Bits,
    unobserved_log_share: Bits,
    sink_log_share: Bits,
    shares: NDArray[np.float32],
    rounding: float,
    keys: NDArray[np.uint32],
    mass: NDArray[np.float32],
    unobserved: NDArray[np.float64],
) -> int:
    """Turn the blocks of rows into keys and mass, and check them.

    Args:
        positions: [rows].
        block_size: tokens.
        ids: [rows, heads, top_k], kept blocks. strongest: offset of each one's strongest key. log_share: of each.
        forced_ids: [rows, forced], see `forced_block_ids`. forced_strongest, forced_log_share: [rows, heads, forced].
        unobserved_log_share, sink_log_share: [rows, heads], of what was not observed, and of learned sinks.
        shares: [65536], the share for each logarithm.
        rounding: how far the shares of a head may be from 1.
        keys, mass: [rows, heads * (top_k + forced)], to be written: of all heads in turn the kept and the forced
            blocks, 0 where a block holds nothing.
        unobserved: [rows], to be written: summed over heads.

    Returns:
        `SOUND`; `OUTSIDE` if a block with mass, or its strongest key, lies outside its row's context; or else
        `UNSOUND` if shares do not sum to 1.
    """
    rows, heads, top_k = ids.shape
    forced_blocks = forced_ids.shape[1]
    outside = unsound = False
    for row in range(rows):
        position, own_keys, own_mass = positions[row], keys[row], mass[row]
        place = 0
        unobserved[row] = 0.0
        for head in range(heads):
            accounted = np.float32(0)
            for block in range(top_k + forced_blocks):
                if block < top_k:
                    number = np.int64(ids[row, head, block])
                    offset = np.int64(strongest[row, head, block])
                    share = shares[log_share[row, head, block]]
                else:
                    number = forced_ids[row, block - top_k]
                    offset = np.int64(forced_strongest[row, head, block - top_k])
                    share = shares[forced_log_share[row, head, block - top_k]]
                accounted += share
                key = number * block_size + offset
                used = share > 0
                if used and (number < 0 or offset >= block_size or key > position):
                    outside = True
                own_keys[place], own_mass[place] = key * used, share
                place += 1
            rest = shares[unobserved_log_share[row, head]]
            unobserved[row] += rest
            # A learned sink stands for no token: its share is accounted for here and belongs to nothing after.
            accounted += rest + shares[sink_log_share[row, head]]
            # What is not a number is not within it either.
            if not abs(accounted - np.float32(1)) <= rounding:
                unsound = True
    if outside:
        return OUTSIDE
    return UNSOUND if unsound else SOUND


@checked_jit()
def heaviest_far_keys(
    keys: NDArray[np.uint32],
    mass: NDArray[np.float32],
    positions: NDArray[np.int64],
    far_lags: NDArray[np.uint32],
    far_mass: NDArray[np.float32],
) -> None:
    """The keys `LEAST_LAG` to `MOST_LAG` back that got most mass, the first tokens aside; see `Row.far_keys`.

    Args:
        keys, mass: [rows, n].
        positions: [rows].
        far_lags: [rows, most], to be written: tokens back to the heaviest ones, heaviest first, the nearer of two
            equals; 0 where there is none.
        far_mass: [rows, most], to be written: summed over all entries of a key.
    """
    rows, entries = keys.shape
    sums = np.zeros(MOST_LAG + 1)
    there = np.empty(MOST_LAG + 1, np.int64)
    most = far_lags.shape[1]
    heaviest = np.empty(most)
    for row in range(rows):
        position, own_keys, own_mass = positions[row], keys[row], mass[row]
        count = 0
        for entry in range(entries):
            lag = position - np.int64(own_keys[entry])
            if LEAST_LAG <= lag <= MOST_LAG and own_keys[entry] >= SINK_TOKENS and own_mass[entry] > 0:
                if sums[lag] == 0.0:
                    there[count] = lag
                    count += 1
                sums[lag] += own_mass[entry]
        for place in range(most):
            far_lags[row, place], heaviest[place] = 0, 0.0
        for found in range(count):
            lag = there[found]
            # The lighter ones make room, the last of them for good.
            place, total = most, sums[lag]
            sums[lag] = 0.0
            while place > 0 and (
                total > heaviest[place - 1] or (total == heaviest[place - 1] and lag < far_lags[row, place - 1])
            ):
                place -= 1
                if place + 1 < most:
                    far_lags[row, place + 1], heaviest[place + 1] = far_lags[row, place], heaviest[place]
            if place < most:
                far_lags[row, place], heaviest[place] = lag, total
        for place in range(most):
            far_mass[row, place] = heaviest[place]
