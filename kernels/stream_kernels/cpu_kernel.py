"""The compiled half of `cpu.py`: every watched layer, row and head in one call that never holds the interpreter lock.

Nothing here allocates. Inner loops run over tokens, channels outside: vLLM's CPU caches keep a channel's tokens side by
side, so that eight keys are scored at once and no sum over a vector's lanes is needed. Keys are widened to float32 once
per unit, in a tile [head_dim, tokens] that stays in the first-level cache, and every head of the unit reads it there.

All jitted functions are in this one file because numba's disk cache watches only the file of the function it compiled.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

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
def _pointer(typing_context, address, element):  # type: ignore[no-untyped-def]
    """The integer `address` as a pointer to elements of the numba type `element`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(element.dtype)(address, element), generate


@intrinsic
def _bfloat16_to_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 whose upper half is the uint16 `bits`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _float16_to_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """The uint16 `bits`, read as float16, as float32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _int_as_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 with the int32 `bits`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _float_as_int(typing_context, value):  # type: ignore[no-untyped-def]
    """The bits of a float32, as int32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(value), generate


@intrinsic
def _acquire_fence(typing_context):  # type: ignore[no-untyped-def]
    """Keeps every earlier read before every later one, for the compiler and the processor."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
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
def _exp(x):  # type: ignore[no-untyped-def]
    """exp(x) for float32 x <= 0, to 2e-7 relative; in a loop it vectorises, which the library's does not."""
    x = max(x, _EXP_FLOOR)
    whole = np.float32(math.floor(x * _LOG2_E + _HALF))
    f = (x - whole * _LN_2_HIGH) - whole * _LN_2_LOW
    series = _ONE + f * (_ONE + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return series * _int_as_float(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))


@_jit()
def _add_mass(left, head, peak, weight):  # type: ignore[no-untyped-def]
    """Adds weight * exp(peak) to a head's (peak, weight) in `left` [n, 2]."""
    if weight == _ZERO or peak == _MINUS_INFINITY:
        return
    if peak <= left[head, 0]:
        left[head, 1] += weight * _exp(peak - left[head, 0])
    else:
        left[head, 1] = left[head, 1] * _exp(left[head, 0] - peak) + weight
        left[head, 0] = peak


@_jit()
def _load_query(address, element_type, scale, out, head_dim):  # type: ignore[no-untyped-def]
    """Reads one query from `address` into `out` [D], times `scale`."""
    if element_type == FLOAT32:
        wide = numba.carray(_pointer(address, types.float32), (head_dim,))
        for c in range(head_dim):
            out[c] = wide[c] * scale
        return
    bits = numba.carray(_pointer(address, types.uint16), (head_dim,))
    for c in range(head_dim):
        out[c] = (_bfloat16_to_float(bits[c]) if element_type == BFLOAT16 else _float16_to_float(bits[c])) * scale


def _copy_run(convert):  # type: ignore[no-untyped-def]
    """The copy of `count` neighbouring tokens of a token group into columns of the tile, for one element type."""

    def copy(stored, group, pack, head_dim, count, tile, column):  # type: ignore[no-untyped-def]
        # `stored` starts at the first token's first channel.
        if pack == 1:
            for c in range(head_dim):
                source, target = stored[c * group :], tile[c, column:]
                for t in range(count):
                    target[t] = convert(source[t])
        elif pack == 2:
            for c in range(0, head_dim, 2):
                source, even, odd = stored[c * group :], tile[c, column:], tile[c + 1, column:]
                for t in range(count):
                    even[t] = convert(source[2 * t])
                    odd[t] = convert(source[2 * t + 1])
        else:
            for c in range(head_dim):
                source, target = stored[(c // pack) * pack * group + c % pack :], tile[c, column:]
                for t in range(count):
                    target[t] = convert(source[t * pack])

    return copy


@_jit()
def _same(x):  # type: ignore[no-untyped-def]
    return x


_copy_bfloat16 = numba.njit(nogil=True, error_model="numpy")(_copy_run(_bfloat16_to_float))
_copy_float16 = numba.njit(nogil=True, error_model="numpy")(_copy_run(_float16_to_float))
_copy_float32 = numba.njit(nogil=True, error_model="numpy")(_copy_run(_same))


@_jit()
def _load_keys(g, address, page_stride, pages, first, count, tile, column):  # type: ignore[no-untyped-def]
    """Copies keys `first` to `first + count` of a row's context into the tile, from `column` on.

    `address` is that of the layer's and KV head's tile in page 0; `pages` is the row's block table.
    """
    size = g.page_size * g.head_dim
    done = 0
    while done < count:
        token = first + done
        within = token % g.page_size
        in_group = within % g.token_group
        run = min(count - done, g.token_group - in_group)
        element = (
            pages[token // g.page_size] * page_stride + (within - in_group) * g.head_dim + in_group * g.channel_pack
        )
        if g.key_type == FLOAT32:
            wide = numba.carray(_pointer(address + 4 * element, types.float32), (size,))
            _copy_float32(wide, g.token_group, g.channel_pack, g.head_dim, run, tile, column + done)
        else:
            bits = numba.carray(_pointer(address + 2 * element, types.uint16), (size,))
            if g.key_type == BFLOAT16:
                _copy_bfloat16(bits, g.token_group, g.channel_pack, g.head_dim, run, tile, column + done)
            else:
                _copy_float16(bits, g.token_group, g.channel_pack, g.head_dim, run, tile, column + done)
        done += run


@_jit(fastmath=_REORDER)
def _dot(query, heads, tile, count, head_dim, logits):  # type: ignore[no-untyped-def]
    """logits[h, t] = query[h] . tile[:, t] for the first `heads` heads and `count` columns; D is a multiple of 4."""
    for h in range(heads):
        row = logits[h]
        for t in range(count):
            row[t] = _ZERO
        for c in range(0, head_dim, 4):
            q0, q1, q2, q3 = query[h, c], query[h, c + 1], query[h, c + 2], query[h, c + 3]
            k0, k1, k2, k3 = tile[c], tile[c + 1], tile[c + 2], tile[c + 3]
            for t in range(count):
                row[t] += (q0 * k0[t] + q1 * k1[t]) + (q2 * k2[t] + q3 * k3[t])


@_jit(fastmath=_REORDER_NO_NAN)
def _largest(values, first, count):  # type: ignore[no-untyped-def]
    largest = values[first]
    for t in range(count):
        largest = max(largest, values[first + t])
    return largest


@_jit(fastmath=_REORDER)
def _weight(values, first, count, peak):  # type: ignore[no-untyped-def]
    """Sum of exp(value - peak)."""
    total = _ZERO
    for t in range(count):
        total += _exp(values[first + t] - peak)
    return total


@_jit()
def _first_equal(values, first, count, wanted):  # type: ignore[no-untyped-def]
    for t in range(count):
        if values[first + t] == wanted:
            return t
    return 0


@_jit()
def _rank(score, tie):  # type: ignore[no-untyped-def]
    """A sort key: larger for a larger float32 score, and among equal ones for a smaller `tie` (below 2**31)."""
    if not score > _MINUS_INFINITY:  # also a NaN: it is never chosen before a number
        score = _MINUS_INFINITY
    bits = np.int64(_float_as_int(np.float32(score + _ZERO)))  # + 0 makes -0 equal to 0
    ordered = bits if bits >= 0 else np.int64(-0x80000000) - bits
    return ordered * np.int64(1 << 31) + (np.int64(0x7FFFFFFF) - tie)


@_jit()
def _kth_largest(work, count, k):  # type: ignore[no-untyped-def]
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
def _score_branches(g, plan, s, heads, address, page_stride, pages, branches):  # type: ignore[no-untyped-def]
    """Peak and weight of every branch's probe keys per head, the unit's score per branch; returns the keys read."""
    probes = len(plan.probe_offsets)
    batch = s.tile.shape[1] // probes
    for first in range(0, branches, batch):
        count = min(batch, branches - first)
        for b in range(count):
            centre = s.start[first + b] + (s.end[first + b] - s.start[first + b]) // 2
            token = (g.sink_blocks + centre) * g.block_size
            for i in range(probes):
                _load_keys(g, address, page_stride, pages, token + plan.probe_offsets[i], 1, s.tile, b * probes + i)
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
def _keep_branches(g, plan, s, heads, branches, keep):  # type: ignore[no-untyped-def]
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
def _descend(g, plan, s, heads, address, page_stride, pages, inner):  # type: ignore[no-untyped-def]
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
def _clear_row(summary, g, row):  # type: ignore[no-untyped-def]
    ids, lse, strongest, forced_lse, forced_strongest, unobserved, keys_read = summary
    ids[:, row] = -1
    lse[:, row] = _MINUS_INFINITY
    strongest[:, row] = 0
    forced_lse[:, row] = _MINUS_INFINITY
    forced_strongest[:, row] = 0
    unobserved[:, row] = _MINUS_INFINITY
    keys_read[:, row] = _ZERO


@_jit()
def _search_unit(g, plan, s, summary, layer, row, unit, context, pages):  # type: ignore[no-untyped-def]
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
def _pages_status(g, pages, context, generations, snapshot):  # type: ignore[no-untyped-def]
    for i in range(-(-context // g.page_size)):
        if not 0 <= pages[i] < g.num_pages:
            return ROW_INVALID
        if len(generations) and generations[pages[i]] > snapshot:
            return ROW_RACED
    return ROW_OK


@_jit()
def _row_status(g, plan, row, context, tables, generations, snapshot):  # type: ignore[no-untyped-def]
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
def _row_pages(tables, table, row):  # type: ignore[no-untyped-def]
    """A row's block table, int32 [max_pages]."""
    return numba.carray(_pointer(tables[table, 0] + 4 * row * tables[table, 1], types.int32), (tables[table, 2],))


@_jit()
def search_rows(  # type: ignore[no-untyped-def]
    g, plan, s, queries, tables, context_lens, generations_address, generations_count, snapshots, summary, status
):
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
