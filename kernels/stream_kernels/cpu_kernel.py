"""The compiled half of `cpu.py`: every watched layer, row and head in one call that never holds the interpreter lock.

Nothing here allocates. Inner loops run over tokens, channels outside: vLLM's CPU caches keep a channel's tokens side by
side, so that eight keys are scored at once and no sum over a vector's lanes is needed. Keys are widened to float32 once
per unit, in a tile [head_dim, tokens] that stays in the first-level cache, and every head of the unit reads it there.

All jitted functions are in this one file because numba's disk cache watches only the file of the function it compiled.
"""

# mypy: disable-error-code="no-any-return"
# Jitted callees have no types that mypy can see.

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numba.extending
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray

# numba has no types of its own; what its decorators return is called freely below.
intrinsic: Callable[[Callable[..., Any]], Any] = numba.extending.intrinsic

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pages = NDArray[np.int32]
Summary = tuple[NDArray[Any], ...]
"""The arrays of a `BlockSummary`, in its order."""

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
"""Element types, as a number because one compiled search serves all three."""

ROW_OK, ROW_RACED, ROW_INVALID = 0, 1, 2
"""Status of a row: searched; its pages were reused while it was; its lengths or pages do not fit what was declared."""


class Geometry(NamedTuple):
    """Sizes fixed for the life of a searcher."""

    layers: int
    query_heads: int
    head_dim: int
    page_size: int
    token_group: int
    channel_pack: int
    key_type: int
    query_type: int
    num_pages: int
    max_context: int
    block_size: int
    top_k: int
    sink_blocks: int
    recent_blocks: int
    exact: int
    rerank: int
    width: int
    """Branches kept per round: `width * top_k` of the settings."""


class Plan(NamedTuple):
    """Which heads search together, and where each layer's memory is."""

    unit_kv_head: NDArray[np.int64]
    """[U] KV head of each unit."""
    unit_first: NDArray[np.int64]
    """[U + 1] where a unit's slots start in `unit_slots`."""
    unit_slots: NDArray[np.int64]
    """[H] positions in the output of the units' heads."""
    slot_head: NDArray[np.int64]
    """[H] query head of each output position."""
    key_address: NDArray[np.int64]
    """[L] address of the layer's first tile."""
    page_stride: NDArray[np.int64]
    """[L] elements from a page to the next."""
    head_stride: NDArray[np.int64]
    """[L] elements from a KV head to the next."""
    scale: NDArray[np.float32]
    """[L] dot product to logit."""
    table: NDArray[np.int64]
    """[L] index of the layer's block table."""
    probe_offsets: NDArray[np.int64]
    """[r] offsets in a block of its probe keys."""


class Scratch(NamedTuple):
    """Working memory. n: heads of the largest unit; W: columns of a tile; C: most branches or candidates at a time."""

    query: NDArray[np.float32]
    """[n, D], scaled."""
    tile: NDArray[np.float32]
    """[D, W], keys."""
    logits: NDArray[np.float32]
    """[n, W]"""
    start: NDArray[np.int64]
    """[C] first inner block of a branch."""
    end: NDArray[np.int64]
    """[C] one past its last."""
    peak: NDArray[np.float32]
    """[n, C] largest logit of a branch's probe keys, later of a candidate block."""
    weight: NDArray[np.float32]
    """[n, C] sum of exp(logit - peak) over the same keys."""
    strongest: NDArray[np.uint8]
    """[n, C] offset of a candidate's largest logit."""
    score: NDArray[np.float32]
    """[C]"""
    rank: NDArray[np.int64]
    """[C] sort keys."""
    work: NDArray[np.int64]
    """[C] sort keys, reordered by selection."""
    left: NDArray[np.float32]
    """[n, 2] peak and weight of all that is not kept."""


def _jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with a disk cache where there is a place for one: read-only installations compile at each start."""

    def compile_(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return compile_


# Sums may be reordered, so that they vectorise; infinities keep their meaning.
_REORDER = {"reassoc", "contract", "nsz"}
# For the largest of many logits: no comparison has to order a NaN, which no finite key can give.
_REORDER_NO_NAN = _REORDER | {"nnan"}


@intrinsic
def _pointer(typing_context: Any, address: Any, element: Any) -> Any:
    """The integer `address` as a pointer to elements of the numba type `element`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(element.dtype)(address, element), generate


@intrinsic
def _bfloat16_to_float(typing_context: Any, bits: Any) -> Any:
    """The float32 whose upper half is the uint16 `bits`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _float16_to_float(typing_context: Any, bits: Any) -> Any:
    """The uint16 `bits`, read as float16, as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _int_as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 with the int32 `bits`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _float_as_int(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, as int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(value), generate


LANES = 8
"""Float32 lanes handled at a time: one AVX2 register; wider and narrower machines split or join them."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_STORED = {BFLOAT16: ir.IntType(16), FLOAT16: ir.HalfType(), FLOAT32: ir.FloatType()}


def _vector_at(builder: Any, address: Any, element: Any, lanes: Any) -> Any:
    """Loads `lanes` elements from an address of any alignment."""
    pointer = builder.inttoptr(address, ir.VectorType(element, lanes).as_pointer())
    return builder.load(pointer, align=2)


def _widen_vector(builder: Any, vector: Any, element_type: Any) -> Any:
    """Stored elements to a float32 vector."""
    if element_type == FLOAT32:
        return vector
    if element_type == FLOAT16:
        return builder.fpext(vector, _FLOATS)
    words = ir.VectorType(ir.IntType(32), LANES)
    shift = ir.Constant(words, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(vector, words), shift), _FLOATS)


def _widen(element_type: int) -> Any:
    """Makes the intrinsic that widens LANES neighbouring tokens of one channel (P = 1)."""

    @intrinsic
    def widen(typing_context: Any, source: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector = _vector_at(builder, args[0], _STORED[element_type], LANES)
            pointer = builder.inttoptr(args[1], _FLOATS.as_pointer())
            builder.store(_widen_vector(builder, vector, element_type), pointer, align=4)
            return context.get_dummy_value()

        return types.none(source, target), generate

    return widen


def _widen_pairs(element_type: int) -> Any:
    """Makes the intrinsic that widens LANES neighbouring tokens of two channels stored in turn (P = 2)."""

    @intrinsic
    def widen(typing_context: Any, source: Any, even: Any, odd: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            both = _vector_at(builder, args[0], _STORED[element_type], 2 * LANES)
            for channel in range(2):
                lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(range(channel, 2 * LANES, 2)))
                vector = builder.shuffle_vector(both, ir.Constant(both.type, ir.Undefined), lanes)
                pointer = builder.inttoptr(args[1 + channel], _FLOATS.as_pointer())
                builder.store(_widen_vector(builder, vector, element_type), pointer, align=4)
            return context.get_dummy_value()

        return types.none(source, even, odd), generate

    return widen


def _dot_columns(vectors: int) -> Any:
    """Makes the intrinsic that scores vectors * LANES columns of a tile against one query, sums held in registers.

    Its arguments are int64: addresses of the query [D] and of the tile's first column, bytes from a channel's row to
    the next, D, and the address for the logits.
    """

    @intrinsic
    def dot(typing_context: Any, query: Any, tile: Any, row_bytes: Any, head_dim: Any, logits: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            query, tile, row_bytes, head_dim, logits = args
            size = query.type
            sums = [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES)) for _ in range(vectors)]
            with cgutils.for_range(builder, head_dim) as loop:
                row = builder.add(tile, builder.mul(loop.index, row_bytes))
                element = builder.add(query, builder.mul(loop.index, ir.Constant(size, 4)))
                scalar = builder.load(builder.inttoptr(element, ir.FloatType().as_pointer()))
                lane = builder.insert_element(
                    ir.Constant(_FLOATS, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
                )
                spread = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
                factor = builder.shuffle_vector(lane, lane, spread)
                for i, total in enumerate(sums):
                    address = builder.add(row, ir.Constant(size, 4 * LANES * i))
                    keys = builder.load(builder.inttoptr(address, _FLOATS.as_pointer()), align=4)
                    product = builder.fmul(factor, keys, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for i, total in enumerate(sums):
                address = builder.add(logits, ir.Constant(size, 4 * LANES * i))
                builder.store(builder.load(total), builder.inttoptr(address, _FLOATS.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.none(query, tile, row_bytes, head_dim, logits), generate

    return dot


_dot_32_columns = _dot_columns(4)
_dot_8_columns = _dot_columns(1)


@intrinsic
def _acquire_fence(typing_context: Any) -> Any:
    """Keeps every earlier read before every later one, for the compiler and the processor."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.none(), generate


_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts: the first has few enough bits that a product with a whole number up to 127 is exact.
_LN_2_HIGH = np.float32(0.693359375)
_LN_2_LOW = np.float32(-2.12194440e-4)
_HALF = np.float32(0.5)
_EXP_FLOOR = np.float32(-87.0)
"""exp of less is not a normal float32; it is taken to be 1.6e-38."""
_C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(n)) for n in range(2, 7))
_ONE = np.float32(1)
_ZERO = np.float32(0)
_MINUS_INFINITY = np.float32(-np.inf)


@_jit(fastmath={"contract"})
def _exp(x: np.float32) -> np.float32:
    """exp(x) for float32 x <= 0, to 2e-7 relative; in a loop it vectorises, which the library's does not."""
    x = max(x, _EXP_FLOOR)
    whole = np.float32(math.floor(x * _LOG2_E + _HALF))
    f = (x - whole * _LN_2_HIGH) - whole * _LN_2_LOW
    series = _ONE + f * (_ONE + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return series * _int_as_float(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))


@_jit()
def _add_mass(left: Floats, head: int, peak: np.float32, weight: np.float32) -> None:
    """Adds weight * exp(peak) to a head's (peak, weight) in `left` [n, 2]."""
    if weight == _ZERO or peak == _MINUS_INFINITY:
        return
    if peak <= left[head, 0]:
        left[head, 1] += weight * _exp(peak - left[head, 0])
    else:
        left[head, 1] = left[head, 1] * _exp(left[head, 0] - peak) + weight
        left[head, 0] = peak


@_jit()
def _load_query(address: int, element_type: int, scale: np.float32, out: Floats, head_dim: int) -> None:
    """Reads one query from `address` into `out` [D], times `scale`."""
    if element_type == FLOAT32:
        wide = numba.carray(_pointer(address, types.float32), (head_dim,))
        for c in range(head_dim):
            out[c] = wide[c] * scale
        return
    bits = numba.carray(_pointer(address, types.uint16), (head_dim,))
    for c in range(head_dim):
        out[c] = (_bfloat16_to_float(bits[c]) if element_type == BFLOAT16 else _float16_to_float(bits[c])) * scale


def _copies(element_type: int, stored_type: Any, convert: Any) -> tuple[Any, Any]:
    """Makes, for one element type, the copies of keys of one token group into columns of the tile.

    `address` is that of the first channel of the first token.
    """
    itemsize = 4 if element_type == FLOAT32 else 2
    widen, widen_pairs = _widen(element_type), _widen_pairs(element_type)

    def copy_run(address: int, group: int, pack: int, head_dim: int, count: int, tile: Floats, column: int) -> None:
        """`count` neighbouring tokens."""
        stored = numba.carray(_pointer(address, stored_type), (group * head_dim,))
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
                    widen_pairs(address + (c * group + 2 * t) * itemsize, row, row + row_bytes)
        if whole < count:
            for c in range(head_dim):
                first = (c // pack) * pack * group + c % pack
                for t in range(whole, count):
                    tile[c, column + t] = convert(stored[first + t * pack])

    def copy_probes(
        address: int, group: int, pack: int, head_dim: int, offsets: Ints, tile: Floats, column: int
    ) -> None:
        """The tokens at `offsets`."""
        stored = numba.carray(_pointer(address, stored_type), (group * head_dim,))
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

    jit = numba.njit(nogil=True, error_model="numpy")
    return jit(copy_run), jit(copy_probes)


@_jit()
def _same(x: np.float32) -> np.float32:
    return x


_copy_bfloat16, _probe_bfloat16 = _copies(BFLOAT16, types.uint16, _bfloat16_to_float)
_copy_float16, _probe_float16 = _copies(FLOAT16, types.uint16, _float16_to_float)
_copy_float32, _probe_float32 = _copies(FLOAT32, types.float32, _same)


@_jit()
def _load_keys(
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
        else:
            _copy_float32(at, g.token_group, g.channel_pack, g.head_dim, run, tile, column + done)
        done += run


@_jit()
def _load_probes(
    g: Geometry, plan: Plan, address: int, page_stride: int, pages: Pages, first: int, tile: Floats, column: int
) -> None:
    """Copies the probe keys of the block that starts at key `first` into the tile, from `column` on."""
    if g.token_group % g.block_size:
        for i in range(len(plan.probe_offsets)):
            _load_keys(g, address, page_stride, pages, first + plan.probe_offsets[i], 1, tile, column + i)
        return
    at = address + _token_bytes(g, page_stride, pages, first)
    if g.key_type == BFLOAT16:
        _probe_bfloat16(at, g.token_group, g.channel_pack, g.head_dim, plan.probe_offsets, tile, column)
    elif g.key_type == FLOAT16:
        _probe_float16(at, g.token_group, g.channel_pack, g.head_dim, plan.probe_offsets, tile, column)
    else:
        _probe_float32(at, g.token_group, g.channel_pack, g.head_dim, plan.probe_offsets, tile, column)


@_jit()
def _token_bytes(g: Geometry, page_stride: int, pages: Pages, token: int) -> int:
    """Bytes from a layer's and head's tile in page 0 to the first channel of a token of the context."""
    within = token % g.page_size
    in_group = within % g.token_group
    element = pages[token // g.page_size] * page_stride + (within - in_group) * g.head_dim + in_group * g.channel_pack
    return element * (4 if g.key_type == FLOAT32 else 2)


@_jit()
def _dot(query: Floats, heads: int, tile: Floats, count: int, head_dim: int, logits: Floats) -> None:
    """logits[h, t] = query[h] . tile[:, t] for the first `heads` heads and `count` columns.

    Columns up to the next multiple of LANES are scored as well, on whatever the tile holds there.
    """
    row_bytes = 4 * tile.shape[1]
    for h in range(heads):
        column = 0
        while column < count:
            source, target = tile.ctypes.data + 4 * column, logits[h].ctypes.data + 4 * column
            if count - column > 3 * LANES:
                _dot_32_columns(query[h].ctypes.data, source, row_bytes, head_dim, target)
                column += 4 * LANES
            else:
                _dot_8_columns(query[h].ctypes.data, source, row_bytes, head_dim, target)
                column += LANES


@_jit(fastmath=_REORDER_NO_NAN)
def _largest(values: Floats, first: int, count: int) -> np.float32:
    largest = values[first]
    for t in range(count):
        largest = max(largest, values[first + t])
    return largest


@_jit(fastmath=_REORDER)
def _weight(values: Floats, first: int, count: int, peak: np.float32) -> np.float32:
    """Sum of exp(value - peak)."""
    total = _ZERO
    for t in range(count):
        total += _exp(values[first + t] - peak)
    return total


@_jit()
def _first_equal(values: Floats, first: int, count: int, wanted: np.float32) -> int:
    for t in range(count):
        if values[first + t] == wanted:
            return t
    return 0


@_jit()
def _rank(score: np.float32, tie: int) -> np.int64:
    """A sort key: larger for a larger float32 score, and among equal ones for a smaller `tie` (below 2**31)."""
    if not score > _MINUS_INFINITY:  # also a NaN: it is never chosen before a number
        score = _MINUS_INFINITY
    bits = np.int64(_float_as_int(np.float32(score + _ZERO)))  # + 0 makes -0 equal to 0
    ordered = bits if bits >= 0 else np.int64(-0x80000000) - bits
    return ordered * np.int64(1 << 31) + (np.int64(0x7FFFFFFF) - tie)


@_jit()
def _kth_largest(work: Ints, count: int, k: int) -> np.int64:
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
    return work[target]


@_jit()
def _score_branches(
    g: Geometry, plan: Plan, s: Scratch, heads: int, address: int, page_stride: int, pages: Pages, branches: int
) -> int:
    """Peak and weight of every branch's probe keys per head, the unit's score per branch; returns the keys read."""
    probes = len(plan.probe_offsets)
    batch = s.tile.shape[1] // probes
    for first in range(0, branches, batch):
        count = min(batch, branches - first)
        for b in range(count):
            centre = s.start[first + b] + (s.end[first + b] - s.start[first + b]) // 2
            token = (g.sink_blocks + centre) * g.block_size
            _load_probes(g, plan, address, page_stride, pages, token, s.tile, b * probes)
        _dot(s.query, heads, s.tile, count * probes, g.head_dim, s.logits)
        for h in range(heads):
            for b in range(count):
                peak = _largest(s.logits[h], b * probes, probes)
                s.peak[h, first + b] = peak
                s.weight[h, first + b] = _weight(s.logits[h], b * probes, probes, peak)
    s.score[:branches] = _MINUS_INFINITY
    for h in range(heads):
        best = _largest(s.peak[h], 0, branches)
        for b in range(branches):
            s.score[b] = max(s.score[b], s.peak[h, b] - best)
    return branches * probes


@_jit()
def _keep_branches(g: Geometry, plan: Plan, s: Scratch, heads: int, branches: int, keep: int) -> int:
    """Keeps the `keep` best of `branches`, in their order; the mass of the others is estimated and added to `left`."""
    if branches <= keep:
        return branches
    for b in range(branches):
        s.rank[b] = _rank(s.score[b], b)
        s.work[b] = s.rank[b]
    worst = _kth_largest(s.work, branches, keep)
    kept = 0
    for b in range(branches):
        if s.rank[b] >= worst:
            s.start[kept], s.end[kept] = s.start[b], s.end[b]
            kept += 1
        else:
            tokens_per_probe = np.float32((s.end[b] - s.start[b]) * g.block_size) / np.float32(len(plan.probe_offsets))
            for h in range(heads):
                _add_mass(s.left, h, s.peak[h, b], s.weight[h, b] * tokens_per_probe)
    return kept


@_jit()
def _descend(
    g: Geometry, plan: Plan, s: Scratch, heads: int, address: int, page_stride: int, pages: Pages, inner: int
) -> tuple[int, int]:
    """The descent: fills `start` with the candidates, ascending. Returns their number and the keys read."""
    if g.exact or inner <= g.top_k or (g.rerank and inner <= g.width):
        for b in range(inner):
            s.start[b] = b
        return inner, 0
    last_keep = g.width if g.rerank else g.top_k
    if inner <= g.width:
        for b in range(inner):
            s.start[b], s.end[b] = b, b + 1
        reads = _score_branches(g, plan, s, heads, address, page_stride, pages, inner)
        return _keep_branches(g, plan, s, heads, inner, last_keep), reads

    for b in range(g.width):
        s.start[b], s.end[b] = b * inner // g.width, (b + 1) * inner // g.width
    kept, reads = g.width, 0
    longest = -(-inner // g.width)
    while longest > 1:
        # Halves are written behind the branches and moved down: of a single block only one half is there to score.
        for b in range(kept - 1, -1, -1):
            s.start[g.width + b], s.end[g.width + b] = s.start[b], s.end[b]
        branches = 0
        for b in range(g.width, g.width + kept):
            start, end = s.start[b], s.end[b]
            middle = start + (end - start) // 2
            if middle > start:
                s.start[branches], s.end[branches] = start, middle
                branches += 1
            s.start[branches], s.end[branches] = middle, end
            branches += 1
        longest -= longest // 2
        reads += _score_branches(g, plan, s, heads, address, page_stride, pages, branches)
        kept = _keep_branches(g, plan, s, heads, branches, g.width if longest > 1 else last_keep)
    return kept, reads


@_jit()
def _clear_row(summary: Summary, g: Geometry, row: int) -> None:
    ids, lse, strongest, forced_lse, forced_strongest, unobserved, keys_read = summary
    ids[:, row] = -1
    lse[:, row] = _MINUS_INFINITY
    strongest[:, row] = 0
    forced_lse[:, row] = _MINUS_INFINITY
    forced_strongest[:, row] = 0
    unobserved[:, row] = _MINUS_INFINITY
    keys_read[:, row] = _ZERO


@_jit()
def _search_unit(
    g: Geometry, plan: Plan, s: Scratch, summary: Summary, layer: int, row: int, unit: int, context: int, pages: Pages
) -> int:
    """Searches for one unit, whose queries are in `s.query`, and writes its heads' results. Returns the keys read."""
    ids, lse, strongest, forced_lse, forced_strongest, unobserved, _ = summary
    slots = plan.unit_slots[plan.unit_first[unit] : plan.unit_first[unit + 1]]
    heads = len(slots)
    page_stride = plan.page_stride[layer]
    itemsize = 4 if g.key_type == FLOAT32 else 2
    address = plan.key_address[layer] + plan.unit_kv_head[unit] * plan.head_stride[layer] * itemsize
    reads = 0

    blocks = -(-context // g.block_size)
    for i in range(g.sink_blocks + g.recent_blocks):
        block = i if i < g.sink_blocks else blocks - g.recent_blocks + i - g.sink_blocks
        if block >= blocks or (i >= g.sink_blocks and block < g.sink_blocks):
            continue
        count = min(g.block_size, context - block * g.block_size)
        _load_keys(g, address, page_stride, pages, block * g.block_size, count, s.tile, 0)
        _dot(s.query, heads, s.tile, count, g.head_dim, s.logits)
        reads += count
        for h in range(heads):
            peak = _largest(s.logits[h], 0, count)
            mass = peak + np.float32(math.log(_weight(s.logits[h], 0, count, peak)))
            forced_lse[layer, row, slots[h], i] = mass
            forced_strongest[layer, row, slots[h], i] = _first_equal(s.logits[h], 0, count, peak)

    inner = blocks - g.sink_blocks - g.recent_blocks
    if inner <= 0:
        return reads
    s.left[:heads, 0] = _MINUS_INFINITY
    s.left[:heads, 1] = _ZERO
    candidates, search_reads = _descend(g, plan, s, heads, address, page_stride, pages, inner)
    reads += search_reads + candidates * g.block_size

    for b in range(candidates):
        first = (g.sink_blocks + s.start[b]) * g.block_size
        _load_keys(g, address, page_stride, pages, first, g.block_size, s.tile, 0)
        _dot(s.query, heads, s.tile, g.block_size, g.head_dim, s.logits)
        for h in range(heads):
            peak = _largest(s.logits[h], 0, g.block_size)
            s.peak[h, b] = peak
            s.weight[h, b] = _weight(s.logits[h], 0, g.block_size, peak)
            s.strongest[h, b] = _first_equal(s.logits[h], 0, g.block_size, peak)

    keep = min(g.top_k, candidates)
    for h in range(heads):
        slot = slots[h]
        for b in range(candidates):
            s.score[b] = s.peak[h, b] + np.float32(math.log(s.weight[h, b]))
            s.rank[b] = _rank(s.score[b], b)
            s.work[b] = s.rank[b]
        worst = _kth_largest(s.work, candidates, keep)
        kept = 0
        for b in range(candidates):
            if s.rank[b] < worst:
                _add_mass(s.left, h, s.peak[h, b], s.weight[h, b])
                continue
            # Insertion into the heaviest-first list; `work` holds the candidates' positions.
            place = kept
            while place > 0 and s.rank[s.work[place - 1]] < s.rank[b]:
                s.work[place] = s.work[place - 1]
                place -= 1
            s.work[place] = b
            kept += 1
        for i in range(kept):
            b = s.work[i]
            ids[layer, row, slot, i] = g.sink_blocks + s.start[b]
            lse[layer, row, slot, i] = s.score[b]
            strongest[layer, row, slot, i] = s.strongest[h, b]
        unobserved[layer, row, slot] = s.left[h, 0] + np.float32(math.log(s.left[h, 1]))
    return reads


@_jit()
def _pages_status(g: Geometry, pages: Pages, context: int, generations: Ints, snapshot: int) -> int:
    for i in range(-(-context // g.page_size)):
        if not 0 <= pages[i] < g.num_pages:
            return ROW_INVALID
        if len(generations) and generations[pages[i]] > snapshot:
            return ROW_RACED
    return ROW_OK


@_jit()
def _row_status(g: Geometry, plan: Plan, row: int, context: int, tables: Ints, generations: Ints, snapshot: int) -> int:
    """Whether a row can be read: its context and pages are in range and no page was reused since its snapshot.

    `tables` [tables, 3] are address, row stride and columns of each block table, the last two in elements.
    """
    if context < 0 or context > g.max_context:
        return ROW_INVALID
    for table in range(len(tables)):
        if -(-context // g.page_size) > tables[table, 2]:
            return ROW_INVALID
        status = _pages_status(g, _row_pages(tables, table, row), context, generations, snapshot)
        if status != ROW_OK:
            return status
    return ROW_OK


@_jit()
def _row_pages(tables: Ints, table: int, row: int) -> Pages:
    """A row's block table, int32 [max_pages]."""
    return numba.carray(_pointer(tables[table, 0] + 4 * row * tables[table, 1], types.int32), (tables[table, 2],))


@_jit()
def search_rows(
    g: Geometry,
    plan: Plan,
    s: Scratch,
    queries: Ints,
    tables: Ints,
    context_lens: NDArray[np.int32],
    generations_address: int,
    generations_count: int,
    snapshots: Ints,
    summary: Summary,
    status: NDArray[np.uint8],
) -> None:
    """Searches every row, layer and unit.

    `queries` int64 [4]: address, then the strides of layer, row and head in elements. `generations_address` points at
    int64 [generations_count], which another thread may write; 0 of them means unguarded. `status` uint8 [R].
    """
    keys_read = summary[6]
    itemsize = 4 if g.query_type == FLOAT32 else 2
    generations = numba.carray(_pointer(generations_address, types.int64), (generations_count,))
    for row in range(len(context_lens)):
        context = np.int64(context_lens[row])
        _clear_row(summary, g, row)
        status[row] = _row_status(g, plan, row, context, tables, generations, snapshots[row])
        if status[row] != ROW_OK or context == 0:
            continue
        for layer in range(g.layers):
            pages = _row_pages(tables, plan.table[layer], row)
            reads = 0
            for unit in range(len(plan.unit_kv_head)):
                first = plan.unit_first[unit]
                for h in range(plan.unit_first[unit + 1] - first):
                    head = plan.slot_head[plan.unit_slots[first + h]]
                    element = layer * queries[1] + row * queries[2] + head * queries[3]
                    address = queries[0] + element * itemsize
                    _load_query(address, g.query_type, plan.scale[layer], s.query[h], g.head_dim)
                reads += _search_unit(g, plan, s, summary, layer, row, unit, context, pages)
            keys_read[layer, row] = np.float32(reads) / np.float32(g.query_heads)
        # A page may have been handed to another request while its keys were read: then nothing of the row is kept.
        _acquire_fence()
        status[row] = _row_status(g, plan, row, context, tables, generations, snapshots[row])
        if status[row] != ROW_OK:
            _clear_row(summary, g, row)
