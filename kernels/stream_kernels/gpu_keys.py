"""Reading keys on a GPU: from the paged cache to logits, and from logits to a block's mass and strongest key."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

import triton
import triton.language as tl

from stream_kernels.gpu_structures import Batch, Cache, Plan, Results, Unit


@triton.jit
def from_bfloat16_bits(bits):
    """int16 bits of bfloat16 to float32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bfloat16_bits(values):
    """float32 to int16 bits of bfloat16, rounded to nearest, ties to even."""
    bits = values.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def as_type(values, TYPE: tl.constexpr):
    """Numbers as the type of that name."""
    if TYPE == "bfloat16":
        numbers = values.to(tl.bfloat16)
    elif TYPE == "float16":
        numbers = values.to(tl.float16)
    else:
        numbers = values.to(tl.float32)
    return numbers


@triton.jit
def load_keys(pointers, mask, TYPE: tl.constexpr, SHAPE: tl.constexpr):
    """Stored keys as TYPE, 0 where masked. 8-bit types go by float16, whose format both are part of: no hardware
    conversion is needed."""
    if SHAPE.key_type == "bfloat16":
        if SHAPE.dot_type == "bfloat16":
            keys = tl.load(pointers, mask=mask, other=0.0)
        else:
            keys = from_bfloat16_bits(tl.load(pointers, mask=mask, other=0))
    elif SHAPE.key_type == "float8_e5m2":
        bits = tl.load(pointers, mask=mask, other=0).to(tl.int16) << 8
        keys = bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif SHAPE.key_type == "float8_e4m3fn":
        # The sign moves to bit 15; exponent and mantissa to where float16 has them, its bias being larger by 8.
        bits = tl.load(pointers, mask=mask, other=0).to(tl.int16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        keys = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        keys = tl.load(pointers, mask=mask, other=0.0)
    return as_type(keys, TYPE)


@triton.jit
def key_pointer(address, SHAPE: tl.constexpr):
    """An address as a pointer to stored keys. All addresses and strides are multiples of 16 bytes (GpuSearch checks);
    saying so lets the compiler load 16 bytes at a time."""
    if SHAPE.key_type == "bfloat16":
        # Triton's interpreter has no such type, and no product is formed in it there.
        if SHAPE.dot_type == "bfloat16":
            pointer = address.to(tl.pointer_type(tl.bfloat16))
        else:
            pointer = address.to(tl.pointer_type(tl.int16))
    elif SHAPE.key_type == "float16":
        pointer = address.to(tl.pointer_type(tl.float16))
    elif SHAPE.key_type == "float32":
        pointer = address.to(tl.pointer_type(tl.float32))
    else:
        pointer = address.to(tl.pointer_type(tl.uint8))
    return tl.multiple_of(pointer, 16)


@triton.jit
def load_stride(pointer, SHAPE: tl.constexpr):
    """A stride of the cache in elements, known to the compiler to be a multiple of 16 bytes."""
    if SHAPE.key_type == "float32":
        stride = tl.multiple_of(tl.load(pointer), 4)
    elif SHAPE.key_type == "bfloat16" or SHAPE.key_type == "float16":
        stride = tl.multiple_of(tl.load(pointer), 8)
    else:
        stride = tl.multiple_of(tl.load(pointer), 16)
    return stride


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap); unchanged where softcap is 0."""
    decay = tl.exp(-2.0 * tl.abs(logits) / tl.where(softcap > 0.0, softcap, 1.0))
    bound = softcap * (1.0 - decay) / (1.0 + decay)
    return tl.where(softcap > 0.0, tl.where(logits < 0.0, -bound, bound), logits)


@triton.jit
def logaddexp(a, b):
    """log(exp(a) + exp(b)), -inf where both are."""
    peak = tl.maximum(a, b)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak + tl.log(tl.exp(a - peak) + tl.exp(b - peak))


@triton.jit
def logsumexp(values, AXIS: tl.constexpr):
    """log(sum(exp(values))) over an axis, -inf where all are."""
    peak = tl.max(values, AXIS)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak + tl.log(tl.sum(tl.exp(values - tl.expand_dims(peak, AXIS)), AXIS))


@triton.jit
def open_unit(item, cache: Cache, plan: Plan, batch: Batch, out: Results, SHAPE: tl.constexpr):
    """The `item`-th (row, layer, unit), counted with the unit innermost. A row whose length is out of range gets the
    status for that and is treated as empty."""
    number = item % SHAPE.units
    layer = (item // SHAPE.units) % SHAPE.layers
    row = item // (SHAPE.units * SHAPE.layers)
    heads = number * SHAPE.group_tile + tl.arange(0, SHAPE.group_tile)
    head = tl.load(plan.head + heads)
    channel = tl.arange(0, SHAPE.dim_tile)
    query = tl.load(
        batch.queries
        + layer.to(tl.int64) * batch.query_layer_stride
        + row.to(tl.int64) * batch.query_row_stride
        + head[:, None] * batch.query_head_stride
        + channel[None, :],
        mask=(head >= 0)[:, None] & (channel < SHAPE.head_dim)[None, :],
        other=0.0,
    )
    context = tl.load(batch.context_lens + row)
    allowed = (context >= 0) & (context <= SHAPE.max_context)
    tl.store(out.status + row, 2, mask=allowed == 0)
    kv_head = tl.load(plan.kv_head + number)
    keys = key_pointer(tl.load(cache.address + layer), SHAPE)
    return Unit(
        layer,
        row,
        kv_head,
        keys + kv_head.to(tl.int64) * load_stride(cache.head_stride + layer, SHAPE),
        load_stride(cache.page_stride + layer, SHAPE),
        load_stride(cache.token_stride + layer, SHAPE),
        tl.load(cache.num_pages + layer),
        batch.block_tables
        + tl.load(cache.table + layer).to(tl.int64) * batch.table_stride
        + row.to(tl.int64) * batch.table_row_stride,
        tl.where(allowed, context, 0),
        tl.load(cache.scale + layer),
        tl.load(cache.softcap + layer),
        query if SHAPE.dot_type != "float32" else query.to(tl.float32),
        tl.load(plan.slot + heads),
        head >= 0,
        out.status + row,
    )


@triton.jit
def read_keys(unit: Unit, tokens, wanted, TYPE: tl.constexpr, SHAPE: tl.constexpr):
    """The keys at positions `tokens` [T], [T, dim_tile] as TYPE, 0 where not wanted; and bool [T], which were read.

    A page id outside the cache marks the row as invalid, and nothing is read there.
    """
    page = tl.load(unit.pages + tokens // SHAPE.page_size, mask=wanted, other=0)
    inside = (page >= 0) & (page < unit.num_pages)
    tl.store(unit.status + tl.zeros_like(tokens), 2, mask=wanted & (inside == 0))
    place = page.to(tl.int64) * unit.page_stride + tokens % SHAPE.page_size * unit.token_stride
    channel = tl.arange(0, SHAPE.dim_tile)
    there = wanted & inside
    mask = there[:, None] & (channel < SHAPE.head_dim)[None, :]
    return load_keys(unit.keys + place[:, None] + channel[None, :], mask, TYPE, SHAPE), there


@triton.jit
def products(unit: Unit, vectors, TYPE: tl.constexpr, SHAPE: tl.constexpr):
    """Scaled products of every head's query and `vectors` [T, dim_tile] of TYPE, float32 [group_tile, T]."""
    query = as_type(unit.query, TYPE)
    if TYPE == "float32":
        logits = tl.dot(query, tl.trans(vectors), input_precision=SHAPE.dot_precision)
    else:
        # Heads are a tensor-core product's columns, of which there may be as few as 8; of rows there are 16 at least.
        # Not so in float32, where the compiler would load vectors 8 bytes at a time for that.
        logits = tl.trans(tl.dot(vectors, tl.trans(query)))
    return logits * unit.scale


@triton.jit
def key_logits(unit: Unit, tokens, wanted, SHAPE: tl.constexpr):
    """Logits of every head and the keys that `read_keys` reads, float32 [group_tile, T]; -inf for the others."""
    TYPE: tl.constexpr = SHAPE.dot_type
    keys, there = read_keys(unit, tokens, wanted, TYPE, SHAPE)
    logits = products(unit, keys, TYPE, SHAPE)
    if SHAPE.softcap:
        logits = capped(logits, unit.softcap)
    return tl.where(there[None, :], logits, float("-inf"))


@triton.jit
def _block_at(unit: Unit, blocks, place, count, LISTED: tl.constexpr):
    """The block that `read_blocks` reads at a place; one beyond the context where there is none."""
    if LISTED:
        block = tl.load(blocks + place, mask=place < count, other=0)
    else:
        first, split, shift = blocks
        number = first + place
        shifted = tl.where(number + shift < split, unit.context, number + shift)
        block = tl.where(number < split, number, shifted)
    return block


@triton.jit
def read_blocks(unit: Unit, blocks, count, LISTED: tl.constexpr, SHAPE: tl.constexpr):
    """Reads up to `top_tile` blocks in full.

    Args:
        blocks: where `LISTED`, pointer to int32 block ids; else (first, split, shift): place n is number first + n, and
            numbers below `split` are block ids, those above it are block ids less `shift`, none of which is below it.
        count: how many places.

    Returns:
        float32 [group_tile, top_tile], each block's log-sum-exp, -inf where there is none; and int32 likewise, the
        position in the context of its strongest key.
    """
    TILES: tl.constexpr = SHAPE.top_tile // SHAPE.read_tile
    lse = tl.full([SHAPE.group_tile, TILES, SHAPE.read_tile], float("-inf"), tl.float32)
    strongest = tl.full([SHAPE.group_tile, TILES, SHAPE.read_tile], 0, tl.int32)
    number = tl.arange(0, TILES)[None, :, None]
    key = tl.arange(0, SHAPE.read_tile * SHAPE.block_size)
    of_block = tl.arange(0, SHAPE.block_size)[None, None, :]
    of_tile = tl.arange(0, SHAPE.read_tile)
    for tile in range((count + SHAPE.read_tile - 1) // SHAPE.read_tile):
        place = tile * SHAPE.read_tile + key // SHAPE.block_size
        block = _block_at(unit, blocks, place, count, LISTED)
        start = _block_at(unit, blocks, tile * SHAPE.read_tile + of_tile, count, LISTED) * SHAPE.block_size
        tokens = block * SHAPE.block_size + key % SHAPE.block_size
        logits = key_logits(unit, tokens, (place < count) & (tokens < unit.context), SHAPE)
        logits = tl.reshape(logits, [SHAPE.group_tile, SHAPE.read_tile, SHAPE.block_size])
        highest = tl.expand_dims(tl.max(logits, 2), 2)
        first = tl.min(tl.where(logits == highest, of_block, SHAPE.block_size - 1), 2)
        peak = start[None, :] + first
        lse = tl.where(number == tile, logsumexp(logits, 2)[:, None, :], lse)
        strongest = tl.where(number == tile, peak[:, None, :], strongest)
    return (
        tl.reshape(lse, [SHAPE.group_tile, SHAPE.top_tile]),
        tl.reshape(strongest, [SHAPE.group_tile, SHAPE.top_tile]),
    )
