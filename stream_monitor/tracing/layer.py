"""What is done with one layer: the search, on as many threads as torch has, and the output it leads to."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import torch

from stream_kernels.prefill import PrefillSummary, Reduction, search_prompt
from stream_kernels.prompt import read_prompt
from stream_kernels.search import SearchConfig
from stream_monitor.tracing.attention import LayerInputs, dense_attention
from stream_monitor.tracing.sparse_attention import sparse_attention
from stream_monitor.tracing.window_search import search_window

AttentionKind = Literal["pruned", "dense"]

_MOST_BLOCKS = 128
"""Query blocks that a thread searches at a time, so that none waits long for the others at the end."""


@dataclass(frozen=True)
class TraceOptions:
    """How a context is traced.

    Attributes:
        search: the strategy and its parameters; queries are taken in blocks of `block_size` too, as the paper does.
        attention: what the next layer sees: the layer's output restricted to the kept blocks (`pruned`, the paper's),
            or all of it (`dense`).
        reduction: over the rows of a query block, see `search_prefill`.
    """

    search: SearchConfig
    attention: AttentionKind = "pruned"
    reduction: Reduction = "max"


def search_layer(inputs: LayerInputs, options: TraceOptions, query_block: int | None = None) -> PrefillSummary:
    """The key blocks that each block of `query_block` queries (`block_size` by default) reads in one layer."""
    size, rows = query_block or options.search.block_size, len(inputs.queries)
    search = _search(inputs, options, size)
    threads = torch.get_num_threads()
    if inputs.keys.device.type != "cpu":
        return search(0, rows)
    step = size * min(_MOST_BLOCKS, max(1, -(-rows // (size * 2 * threads))))
    starts = range(0, rows, step)
    # A search is many small operations. Torch's own threads cost them more than they save: ten times the time and
    # more on a machine that has other things to do.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return _joined(pool.map(lambda first: search(first, min(rows, first + step)), starts))


def _search(inputs: LayerInputs, options: TraceOptions, size: int) -> Callable[[int, int], PrefillSummary]:
    """Makes the search for the queries from one row to before another, in blocks of `size`; any thread may call it."""
    whole = (
        None
        if inputs.window
        else read_prompt(inputs.keys, inputs.queries.shape[1], options.search, softcap=inputs.softcap)
    )

    def search(first: int, last: int) -> PrefillSummary:
        with torch.inference_mode():  # which holds for one thread alone
            if whole is None:
                return search_window(_rows(inputs, first, last), options.search, size, options.reduction)
            return search_prompt(
                inputs.queries[first:last],
                whole,
                scale=inputs.scale,
                first_query=inputs.first_query + first,
                query_block=size,
                reduction=options.reduction,
            )

    return search


def _rows(inputs: LayerInputs, first: int, last: int) -> LayerInputs:
    """Rows `first` to `last`, and the keys up to the last of them."""
    end = inputs.first_query + last
    return replace(inputs, queries=inputs.queries[first:last], keys=inputs.keys[:end], values=inputs.values[:end])


def _joined(parts: Iterable[PrefillSummary]) -> PrefillSummary:
    found = [vars(part) for part in parts]
    return PrefillSummary(**{name: torch.cat([part[name] for part in found]) for name in found[0]})


def attend(inputs: LayerInputs, found: PrefillSummary, options: TraceOptions) -> torch.Tensor:
    """The layer's output [Q, H, Dv] as `options.attention` wants it."""
    if options.attention == "dense":
        return dense_attention(inputs)
    return sparse_attention(inputs, found, options.search.block_size)
