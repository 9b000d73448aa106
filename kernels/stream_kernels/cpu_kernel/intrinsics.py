"""Instructions that numba has no word for: reads from addresses, element types, vectors of eight, a memory fence."""

from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import ir
from numba import types
from numba.core import cgutils

from stream_kernels.cpu_kernel.structures import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32

# numba has no types of its own; what its decorators return is called freely in this package.
intrinsic: Callable[[Callable[..., Any]], Any] = numba.extending.intrinsic


@intrinsic
def pointer(typing_context: Any, address: Any, element: Any) -> Any:
    """The integer `address` as a pointer to elements of the numba type `element`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(element.dtype)(address, element), generate


@intrinsic
def int_as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 with the int32 `bits`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def float_as_int(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, as int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(value), generate


@intrinsic
def larger(typing_context: Any, one: Any, other: Any) -> Any:
    """The larger of two float32, neither a NaN. The largest of many vectorises by it, which it does not by `max`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), ir.FloatType()])
        return builder.call(
            builder.module.declare_intrinsic("llvm.maxnum", [ir.FloatType()], kind), args, fastmath=("nnan", "nsz")
        )

    return types.float32(one, other), generate


LANES = 8
"""Float32 lanes handled at a time: one AVX2 register; wider and narrower machines split or join them."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_STORED = {
    BFLOAT16: ir.IntType(16),
    FLOAT16: ir.IntType(16),
    FLOAT32: ir.FloatType(),
    FLOAT8_E4M3: ir.IntType(8),
    FLOAT8_E5M2: ir.IntType(8),
}


def _vector_at(builder: Any, address: Any, element: Any, lanes: Any) -> Any:
    """Loads `lanes` elements from an address of any alignment."""
    pointer = builder.inttoptr(address, ir.VectorType(element, lanes).as_pointer())
    return builder.load(pointer, align=1)


def _widen(builder: Any, stored: Any, element_type: int, lanes: int = 0) -> Any:
    """Stored elements to float32: a vector of `lanes`, or a single one.

    The 8-bit types go by float16, whose format both are part of. The bits of an E4M3 NaN, which no number is stored
    as, come out as 480.
    """

    def like(kind: Any) -> Any:
        return ir.VectorType(kind, lanes) if lanes else kind

    def constant(kind: Any, value: float) -> Any:
        return ir.Constant(like(kind), [value] * lanes if lanes else value)

    short, word, floats = ir.IntType(16), ir.IntType(32), like(ir.FloatType())
    if element_type == FLOAT32:
        return stored
    if element_type == BFLOAT16:
        return builder.bitcast(builder.shl(builder.zext(stored, like(word)), constant(word, 16)), floats)
    if element_type == FLOAT16:
        return builder.fpext(builder.bitcast(stored, like(ir.HalfType())), floats)
    bits = builder.zext(stored, like(short))
    if element_type == FLOAT8_E5M2:
        return builder.fpext(builder.bitcast(builder.shl(bits, constant(short, 8)), like(ir.HalfType())), floats)
    # The sign moves to bit 15; exponent and mantissa to where float16 has them, its bias being larger by 8.
    sign = builder.shl(builder.and_(bits, constant(short, 0x80)), constant(short, 8))
    rest = builder.shl(builder.and_(bits, constant(short, 0x7F)), constant(short, 7))
    halves = builder.bitcast(builder.or_(sign, rest), like(ir.HalfType()))
    return builder.fmul(builder.fpext(halves, floats), constant(ir.FloatType(), 256.0))


def to_float(element_type: int) -> Any:
    """Makes the intrinsic that widens one stored element, given as a number or as the unsigned integer of its bits."""

    @intrinsic
    def widen(typing_context: Any, stored: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _widen(builder, args[0], element_type)

        return types.float32(stored), generate

    return widen


bfloat16_to_float = to_float(BFLOAT16)


def widen_channel(element_type: int) -> Any:
    """Makes the intrinsic that widens LANES neighbouring tokens of one channel (P = 1)."""

    @intrinsic
    def widen(typing_context: Any, source: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector = _vector_at(builder, args[0], _STORED[element_type], LANES)
            pointer = builder.inttoptr(args[1], _FLOATS.as_pointer())
            builder.store(_widen(builder, vector, element_type, LANES), pointer, align=4)
            return context.get_dummy_value()

        return types.none(source, target), generate

    return widen


def widen_pairs(element_type: int) -> Any:
    """Makes the intrinsic that widens LANES neighbouring tokens of two channels stored in turn (P = 2)."""

    @intrinsic
    def widen(typing_context: Any, source: Any, even: Any, odd: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            both = _vector_at(builder, args[0], _STORED[element_type], 2 * LANES)
            for channel in range(2):
                lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(range(channel, 2 * LANES, 2)))
                vector = builder.shuffle_vector(both, ir.Constant(both.type, ir.Undefined), lanes)
                pointer = builder.inttoptr(args[1 + channel], _FLOATS.as_pointer())
                builder.store(_widen(builder, vector, element_type, LANES), pointer, align=4)
            return context.get_dummy_value()

        return types.none(source, even, odd), generate

    return widen


def dot_columns(vectors: int, queries: int) -> Any:
    """Makes the intrinsic that scores vectors * LANES columns of a tile against some queries, sums held in registers.

    Its arguments are int64: address of the first query [D], bytes from a query to the next, address of the tile's first
    column, bytes from a channel's row to the next, D, address for the first query's logits, and bytes to the next's.
    vectors * queries + vectors + 1 registers are in use: at most 16 on a machine with AVX2.
    """

    @intrinsic
    def dot(
        typing_context: Any,
        query: Any,
        query_bytes: Any,
        tile: Any,
        row_bytes: Any,
        head_dim: Any,
        logits: Any,
        logits_bytes: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            query, query_bytes, tile, row_bytes, head_dim, logits, logits_bytes = args
            size = query.type
            zero = ir.Constant(_FLOATS, [0.0] * LANES)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(vectors)] for _ in range(queries)]
            with cgutils.for_range(builder, head_dim) as loop:
                row = builder.add(tile, builder.mul(loop.index, row_bytes))
                keys = []
                for i in range(vectors):
                    address = builder.add(row, ir.Constant(size, 4 * LANES * i))
                    keys.append(builder.load(builder.inttoptr(address, _FLOATS.as_pointer()), align=4))
                for q, totals in enumerate(sums):
                    first = builder.add(query, builder.mul(query_bytes, ir.Constant(size, q)))
                    element = builder.add(first, builder.mul(loop.index, ir.Constant(size, 4)))
                    factor = _spread(builder, builder.load(builder.inttoptr(element, ir.FloatType().as_pointer())))
                    for total, key in zip(totals, keys, strict=True):
                        product = builder.fmul(factor, key, flags=("contract",))
                        builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for q, totals in enumerate(sums):
                first = builder.add(logits, builder.mul(logits_bytes, ir.Constant(size, q)))
                for i, total in enumerate(totals):
                    address = builder.add(first, ir.Constant(size, 4 * LANES * i))
                    builder.store(builder.load(total), builder.inttoptr(address, _FLOATS.as_pointer()), align=4)
            return context.get_dummy_value()

        arguments = (query, query_bytes, tile, row_bytes, head_dim, logits, logits_bytes)
        return types.none(*arguments), generate

    return dot


def dot_bfloat16(queries: int) -> Any:
    """Makes the intrinsic that multiplies one bfloat16 vector with some float32 queries, sums held in registers.

    Its arguments are int64: address of the bfloat16 vector [D], address of the first query [D], bytes from a query to
    the next, D (a multiple of LANES), address for the first product, and bytes to the next's.
    """

    @intrinsic
    def dot(
        typing_context: Any,
        vector: Any,
        query: Any,
        query_bytes: Any,
        head_dim: Any,
        products: Any,
        products_bytes: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector, query, query_bytes, head_dim, products, products_bytes = args
            size = query.type
            zero = ir.Constant(_FLOATS, [0.0] * LANES)
            sums = [cgutils.alloca_once_value(builder, zero) for _ in range(queries)]
            with cgutils.for_range(builder, builder.udiv(head_dim, ir.Constant(size, LANES))) as loop:
                stored = builder.add(vector, builder.mul(loop.index, ir.Constant(size, 2 * LANES)))
                wide = _widen(builder, _vector_at(builder, stored, _STORED[BFLOAT16], LANES), BFLOAT16, LANES)
                at = builder.add(query, builder.mul(loop.index, ir.Constant(size, 4 * LANES)))
                for q, total in enumerate(sums):
                    address = builder.add(at, builder.mul(query_bytes, ir.Constant(size, q)))
                    part = builder.load(builder.inttoptr(address, _FLOATS.as_pointer()), align=4)
                    product = builder.fmul(wide, part, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            sums = _sums_over_lanes(builder, [builder.load(total) for total in sums])
            for q in range(queries):
                address = builder.add(products, builder.mul(products_bytes, ir.Constant(size, q)))
                whole = builder.extract_element(sums, ir.Constant(ir.IntType(32), q))
                builder.store(whole, builder.inttoptr(address, ir.FloatType().as_pointer()))
            return context.get_dummy_value()

        arguments = (vector, query, query_bytes, head_dim, products, products_bytes)
        return types.none(*arguments), generate

    return dot


def _sums_over_lanes(builder: Any, vectors: list[Any]) -> Any:
    """A vector whose lanes are the sums over the lanes of each of at most eight vectors.

    What is to be added is shuffled side by side, of two vectors at a time: seven additions and fourteen shuffles for
    eight vectors, where one by one takes 24 of each.
    """

    def joined(one: Any, other: Any, first: list[int], second: list[int]) -> Any:
        parts = [
            builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes))
            for lanes in (first, second)
        ]
        return builder.fadd(*parts)

    rest = vectors + [ir.Constant(_FLOATS, [0.0] * LANES)] * (LANES - len(vectors))
    for _ in range(2):
        # Neighbours within each half, which shuffles of one instruction do not cross.
        pairs = zip(rest[::2], rest[1::2], strict=True)
        rest = [joined(a, b, [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]) for a, b in pairs]
    return joined(rest[0], rest[1], [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])


def _spread(builder: Any, scalar: Any) -> Any:
    """A vector whose lanes all are `scalar`."""
    lane = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(lane, lane, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Asks the processor to bring the cache line at an int64 address near, and does not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer_type, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer_type], ir.FunctionType(ir.VoidType(), [pointer_type, word, word, word])
        )
        read, keep, data = (ir.Constant(word, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], pointer_type), read, keep, data])
        return context.get_dummy_value()

    return types.none(address), generate


@intrinsic
def acquire_fence(typing_context: Any) -> Any:
    """Keeps every earlier read before every later one, for the compiler and the processor."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.none(), generate
