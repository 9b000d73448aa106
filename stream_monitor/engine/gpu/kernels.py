"""Kernels on the engine's main stream: gather the query rows of a layer, snapshot the sampled ones.

They move bits, not numbers: the host hands elements of 8, 16 and 32 bits over as integers, whatever they mean.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives every name in a kernel its type.

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def gather_rows_kernel(
    query, query_stride, tokens, query_start_loc, rows, passes, width, PER_REQUEST: tl.constexpr, CHUNK: tl.constexpr
):
    """Copies the last PER_REQUEST query rows of each request, of those it has, and counts the pass.

    Grid (requests * PER_REQUEST, chunks of a row). Requests of a CUDA graph that the batch does not fill have no
    tokens: their two entries of `query_start_loc` are equal (v1/worker/gpu/model_runner.py `prepare_inputs`). An idle
    rank's dummy batch may come with those of the batch before (v1/worker/gpu_model_runner.py `_dummy_run`): what they
    say lies beyond its tokens is not read.

    Args:
        query: [tokens, width], elements of a row contiguous, `query_stride` elements from one to the next.
        query_start_loc: int32 [requests + 1].
        rows: [requests * PER_REQUEST, width]; a request's last row is the last of its part.
        passes: int32 [1], goes up by 1.
    """
    place = tl.program_id(0)
    request = place // PER_REQUEST
    element = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    token = tl.load(query_start_loc + request + 1) - (PER_REQUEST - place % PER_REQUEST)
    if (token >= tl.load(query_start_loc + request)) & (token < tokens):
        inside = element < width
        row = tl.load(query + token.to(tl.int64) * query_stride + element, mask=inside)
        tl.store(rows + place.to(tl.int64) * width + element, row, mask=inside)
    if place == 0 and tl.program_id(1) == 0:
        tl.store(passes, tl.load(passes) + 1)


@triton.jit(do_not_specialize=["tokens"])
def gather_prompt_rows_kernel(
    query,
    query_stride,
    tokens,
    query_start_loc,
    requests,
    rows,
    width,
    STRIDE: tl.constexpr,
    MOST: tl.constexpr,
    REQUESTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Copies the query rows of prompts that are captured on demand (`prompt_rows`).

    Grid (stretches of STRIDE query tokens, chunks of a row). In a stretch lies one such row at most, of any request.

    Args:
        query, tokens, query_start_loc: as `gather_rows_kernel` has them.
        requests: most of a batch, REQUESTS at most.
        rows: [stretches, width]; of a stretch without such a row it stays as it is.
    """
    stretch = tl.program_id(0)
    begin = stretch * STRIDE
    request = tl.arange(0, REQUESTS)
    known = request < requests
    first = tl.load(query_start_loc + request, mask=known, other=0)
    last = tl.load(query_start_loc + request + 1, mask=known, other=0) - 1
    spacing = STRIDE * tl.maximum(1, tl.cdiv(last + 1 - first, STRIDE * MOST))
    # The last row of each request at a multiple of its spacing from the end that is not behind the stretch.
    back = tl.maximum(0, last - (begin + STRIDE - 1))
    token = last - tl.cdiv(back, spacing) * spacing
    captured = (token >= begin) & (token < begin + STRIDE) & (token >= first) & (token < last)
    found = tl.max(tl.where(captured, token, -1))
    if (found >= 0) & (found < tokens):
        element = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        inside = element < width
        row = tl.load(query + found.to(tl.int64) * query_stride + element, mask=inside)
        tl.store(rows + stretch.to(tl.int64) * width + element, row, mask=inside)


@triton.jit
def snapshot_kernel(
    batch_rows,
    batch_rows_stride,
    rows,
    layer_stride,
    queries,
    slot_layer_stride,
    width,
    layers,
    seq_lens,
    slot_seq_lens,
    table,
    table_stride,
    slot_table,
    slot_table_stride,
    page_tokens,
    CHUNK: tl.constexpr,
):
    """Copies query rows, lengths and block-table rows of the sampled requests into a slot.

    Grid (sampled rows, layers + 1): the last program of a row copies its length and its pages.

    Args:
        batch_rows: int32 [3, sampled rows], `batch_rows_stride` apart: where each is in `rows`, its request, and how
            many query rows of that come after it.
        rows: [layers, places, width]; queries: [layers, slot rows, width].
        seq_lens: int32 [requests], after the last row; slot_seq_lens: int32 [slot rows].
        table: int32 [requests, pages]; slot_table: int32 [slot rows, pages].
    """
    n = tl.program_id(0)
    layer = tl.program_id(1)
    batch_row = tl.load(batch_rows + n).to(tl.int64)
    offset = tl.arange(0, CHUNK)
    if layer < layers:
        source = rows + layer.to(tl.int64) * layer_stride + batch_row * width
        target = queries + layer.to(tl.int64) * slot_layer_stride + n.to(tl.int64) * width
        for start in range(0, width, CHUNK):
            inside = start + offset < width
            tl.store(target + start + offset, tl.load(source + start + offset, mask=inside), mask=inside)
    else:
        request = tl.load(batch_rows + batch_rows_stride + n).to(tl.int64)
        length = tl.load(seq_lens + request) - tl.load(batch_rows + 2 * batch_rows_stride + n)
        tl.store(slot_seq_lens + n, length)
        pages = tl.minimum((length + page_tokens - 1) // page_tokens, slot_table_stride)
        for start in range(0, pages, CHUNK):
            inside = start + offset < pages
            ids = tl.load(table + request * table_stride + start + offset, mask=inside)
            tl.store(slot_table + n.to(tl.int64) * slot_table_stride + start + offset, ids, mask=inside)
