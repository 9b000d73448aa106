"""Reads queries and keys where the engine keeps them, widened to float32."""

from typing import Any

import numba
import numpy as np
from numba import types

from stream_kernels.compiling import jit
from stream_kernels.cpu_kernel.intrinsics import (
    LANES,
    bfloat16_to_float,
    pointer,
    prefetch,
    to_float,
    widen_channel,
    widen_pairs,
)
from stream_kernels.cpu_kernel.structures import (
    BFLOAT16,
    ELEMENT_BYTES,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    FLOAT16,
    FLOAT32,
    Floats,
    Geometry,
    Ints,
    Pages,
    Plan,
)

_float16_to_float = to_float(FLOAT16)


@jit()
def load_query(address: int, element_type: int, scale: np.float32, out: Floats, head_dim: int) -> None:
    """Reads one query from `address` into `out` [D], times `scale`."""
    if element_type == FLOAT32:
        wide = numba.carray(pointer(address, types.float32), (head_dim,))
        for c in range(head_dim):
            out[c] = wide[c] * scale
        return
    bits = numba.carray(pointer(address, types.uint16), (head_dim,))
    for c in range(head_dim):
        out[c] = (bfloat16_to_float(bits[c]) if element_type == BFLOAT16 else _float16_to_float(bits[c])) * scale


def _copies(element_type: int, stored_type: Any) -> tuple[Any, Any]:
    """Makes, for one element type, the copies of keys of one token group into columns of the tile.

    `address` is that of the first channel of the first token.
    """
    itemsize = ELEMENT_BYTES[element_type]
    convert, widen, widen_two = to_float(element_type), widen_channel(element_type), widen_pairs(element_type)

    def copy_run(address: int, group: int, pack: int, head_dim: int, count: int, tile: Floats, column: int) -> None:
        """`count` neighbouring tokens."""
        stored = numba.carray(pointer(address, stored_type), (group * head_dim,))
        row_bytes = 4 * tile.shape[1]
        target = tile.ctypes.data + 4 * column
        whole = count - count % LANES if pack <= 2 else 0
        if pack == 1:
            for c in range(head_dim):
                for t in range(0, whole, LANES):
                    widen(address + (c * group + t) * itemsize, target + c * row_bytes + 4 * t)
        elif pack == 2:
            for c in range(0, head_dim, 2):
                for t in range(0, whole, LANES):
                    row = target + c * row_bytes + 4 * t
                    widen_two(address + (c * group + 2 * t) * itemsize, row, row + row_bytes)
        if whole < count:
            for c in range(head_dim):
                first = (c // pack) * pack * group + c % pack
                for t in range(whole, count):
                    tile[c, column + t] = convert(stored[first + t * pack])

    def copy_probes(
        address: int, group: int, pack: int, head_dim: int, offsets: Ints, tile: Floats, column: int
    ) -> None:
        """The tokens at `offsets`."""
        stored = numba.carray(pointer(address, stored_type), (group * head_dim,))
        probes = len(offsets)
        if probes == 4:  # the default; unrolled it is several times faster
            o0, o1, o2, o3 = offsets[0] * pack, offsets[1] * pack, offsets[2] * pack, offsets[3] * pack
            for c in range(head_dim):
                first = (c // pack) * pack * group + c % pack
                tile[c, column] = convert(stored[first + o0])
                tile[c, column + 1] = convert(stored[first + o1])
                tile[c, column + 2] = convert(stored[first + o2])
                tile[c, column + 3] = convert(stored[first + o3])
        else:
            for c in range(head_dim):
                first = (c // pack) * pack * group + c % pack
                for i in range(probes):
                    tile[c, column + i] = convert(stored[first + offsets[i] * pack])

    return jit()(copy_run), jit()(copy_probes)


_copy_bfloat16, _probe_bfloat16 = _copies(BFLOAT16, types.uint16)
_copy_float16, _probe_float16 = _copies(FLOAT16, types.uint16)
_copy_float32, _probe_float32 = _copies(FLOAT32, types.float32)
_copy_e4m3, _probe_e4m3 = _copies(FLOAT8_E4M3, types.uint8)
_copy_e5m2, _probe_e5m2 = _copies(FLOAT8_E5M2, types.uint8)


@jit()
def load_keys(
    g: Geometry, address: int, page_stride: int, pages: Pages, first: int, count: int, tile: Floats, column: int
) -> None:
    """Copies keys `first` to `first + count` of a row's context into the tile, from `column` on.

    `address` is that of the layer's and KV head's tile in page 0; `pages` is the row's block table.
    """
    done = 0
    while done < count:
        token = first + done
        in_group = token % g.page_size % g.token_group
        run = min(count - done, g.token_group - in_group)
        at = address + _token_bytes(g, page_stride, pages, token)
        if g.key_type == BFLOAT16:
            _copy_bfloat16(at, g.token_group, g.channel_pack, g.head_dim, run, tile, column + done)
        elif g.key_type == FLOAT16:
            _copy_float16(at, g.token_group, g.channel_pack, g.head_dim, run, tile, column + done)
        elif g.key_type == FLOAT32:
            _copy_float32(at, g.token_group, g.channel_pack, g.head_dim, run, tile, column + done)
        elif g.key_type == FLOAT8_E4M3:
            _copy_e4m3(at, g.token_group, g.channel_pack, g.head_dim, run, tile, column + done)
        else:
            _copy_e5m2(at, g.token_group, g.channel_pack, g.head_dim, run, tile, column + done)
        done += run


@jit()
def in_place(g: Geometry, first: int) -> bool:
    """Whether the block that starts at key `first` can be scored where it is: float32, tokens of a channel adjacent."""
    side_by_side = g.key_type == FLOAT32 and g.channel_pack == 1
    return side_by_side and first % g.page_size % g.token_group + g.block_size <= g.token_group


@jit()
def key_address(g: Geometry, address: int, page_stride: int, pages: Pages, token: int) -> int:
    """Address of the first channel of a token of the context."""
    return address + _token_bytes(g, page_stride, pages, token)


@jit()
def prefetch_block(g: Geometry, address: int, page_stride: int, pages: Pages, first: int) -> None:
    """Asks for the cache lines of the block that starts at key `first`, where its tokens' channels lie adjacent."""
    if first % g.page_size % g.token_group + g.block_size > g.token_group:
        return  # several runs: rare layouts do without
    itemsize = ELEMENT_BYTES[g.key_type]
    at = address + _token_bytes(g, page_stride, pages, first)
    row = g.token_group * g.channel_pack * itemsize
    for c in range(g.head_dim // g.channel_pack):
        for line in range(0, g.block_size * g.channel_pack * itemsize, 64):
            prefetch(at + c * row + line)


@jit()
def load_probes(
    g: Geometry, plan: Plan, address: int, page_stride: int, pages: Pages, first: int, tile: Floats, column: int
) -> None:
    """Copies the probe keys of the block that starts at key `first` into the tile, from `column` on."""
    if g.token_group % g.block_size:
        for i in range(len(plan.probe_offsets)):
            load_keys(g, address, page_stride, pages, first + plan.probe_offsets[i], 1, tile, column + i)
        return
    at = address + _token_bytes(g, page_stride, pages, first)
    if g.key_type == BFLOAT16:
        _probe_bfloat16(at, g.token_group, g.channel_pack, g.head_dim, plan.probe_offsets, tile, column)
    elif g.key_type == FLOAT16:
        _probe_float16(at, g.token_group, g.channel_pack, g.head_dim, plan.probe_offsets, tile, column)
    elif g.key_type == FLOAT32:
        _probe_float32(at, g.token_group, g.channel_pack, g.head_dim, plan.probe_offsets, tile, column)
    elif g.key_type == FLOAT8_E4M3:
        _probe_e4m3(at, g.token_group, g.channel_pack, g.head_dim, plan.probe_offsets, tile, column)
    else:
        _probe_e5m2(at, g.token_group, g.channel_pack, g.head_dim, plan.probe_offsets, tile, column)


@jit()
def _token_bytes(g: Geometry, page_stride: int, pages: Pages, token: int) -> int:
    """Bytes from a layer's and head's tile in page 0 to the first channel of a token of the context."""
    within = token % g.page_size
    in_group = within % g.token_group
    page: int = pages[token // g.page_size]
    element = page * page_stride + (within - in_group) * g.head_dim + in_group * g.channel_pack
    return element * ELEMENT_BYTES[g.key_type]
