"""Keys read, time and memory of a beam search as the context grows from 4k to 1M tokens.

Four watched layers share one cache, to save memory, and have queries and block summaries of their own. Every round
takes other queries, so that nothing a round reads is in the processor's caches but what all queries read. Times are
the CPU time of the searching thread, which other processes on the machine disturb least.
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.attention import Attention, load_tokenizer, of_text
from benchmarks.paging import PAGE_SIZE, allocate, layout, store
from benchmarks.report import Report, bootstrap, run
from benchmarks.texts import KINDS, token_ids
from stream_kernels.cpu import CpuSearch
from stream_kernels.index import summary_bytes
from stream_kernels.layout import PagedKeys
from stream_kernels.search import BlockSummary, SearchConfig

SHORTEST, LONGEST = 2**12, 2**20
GROWTH_FROM = 2**16
"""Context from which on the growth of time is judged; below, fixed costs hide it."""

LAYERS = 4
QUERIES = 64
"""Different queries, in turn."""

GROUP, KV_HEADS, HEAD_DIM = 7, 2, 128
"""Without a model."""

INDEX_LAYERS, INDEX_KV_HEADS, INDEX_HEAD_DIM = 28, 2, 128
"""The model whose index is measured (Qwen2.5-7B has twice the KV heads, Qwen2.5-1.5B these)."""

SEGMENT = 16
"""Tokens over which a random walk stands still."""

SOURCE = 8_000
"""Tokens of the text whose keys are repeated."""

CHUNK = 2**14
"""Tokens written at a time."""


def main(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a model whose keys to repeat; none: random walks.")
    ] = None,
    text: Annotated[str, typer.Option(help=f"The text whose keys to repeat: {', '.join(KINDS)}.")] = "prose",
    traces: Annotated[Path | None, typer.Option(help="JSON lines of recorded reasoning, for that text.")] = None,
    seed: Annotated[int, typer.Option(help="Of the keys, the queries and the resamples.")] = 0,
    longest: Annotated[int, typer.Option(help="Longest context; a power of two.")] = LONGEST,
    full: Annotated[bool, typer.Option("--full", help="Five times as many rounds.")] = False,
) -> None:
    """Cost of a search against the length of the context; 2 GiB of memory at 1M tokens."""
    if longest < 2 * SHORTEST or longest & (longest - 1):
        raise typer.BadParameter(f"--longest {longest}: a power of two from {2 * SHORTEST}")
    if model is None:
        queries, scale, chunks = _random_walk(seed, longest)
    else:
        attention = _attention(model, text, seed, traces)
        queries, scale, chunks = _repeated(attention, seed, longest)
    _, kv_heads, group, dim = queries.shape
    cache = allocate(longest, kv_heads, dim)
    for index, keys in enumerate(chunks):
        store(cache, index * CHUNK // PAGE_SIZE, keys)

    config = SearchConfig(strategy="beam")
    lengths = [SHORTEST << i for i in range((longest // SHORTEST).bit_length())]
    rounds = 300 if full else 60
    searches = [_Search(cache[: length // PAGE_SIZE], scale, kv_heads * group, config, length) for length in lengths]
    steps = queries.flatten(1, 2)
    times: dict[int, list[float]] = {length: [] for length in lengths}
    reads: dict[int, list[float]] = {length: [] for length in lengths}
    for index in range(rounds):
        draw = [(index * LAYERS + layer) % QUERIES for layer in range(LAYERS)]
        for length, search in zip(lengths, searches, strict=True):
            elapsed, keys_read = search.run(steps[draw][:, None])
            times[length].append(elapsed)
            reads[length].append(keys_read)

    report = Report(
        benchmark="scaling",
        config={
            "keys": "random walk" if model is None else f"{model.name}, {text}, repeated with jitter",
            "group": group,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "page_size": PAGE_SIZE,
            "top_k": config.top_k,
            "time": "thread CPU time of one row of one layer, median",
            "rounds": rounds,
        },
        seed=seed,
        n=rounds * LAYERS,
    )
    _account(times, reads, report)
    report.finish()


class _Search:
    """One context length, with its summaries built."""

    def __init__(self, cache: torch.Tensor, scale: float, heads: int, config: SearchConfig, length: int) -> None:
        keys = [PagedKeys(cache, layout(cache.shape[-1] // 2), scale)] * LAYERS
        self._search = CpuSearch(keys, heads, config, max_rows=1, max_context=length, query_dtype=torch.bfloat16)
        self._table = [np.arange(len(cache), dtype=np.int32)[None]]
        self._context = np.array([length], np.int32)
        self._out = BlockSummary.allocate(LAYERS, 1, heads, config)
        self.run(torch.zeros(LAYERS, 1, heads, cache.shape[-1] // 2, dtype=torch.bfloat16))

    def run(self, queries: torch.Tensor) -> tuple[float, float]:
        """Seconds and key-equivalents per query head, of one row of one layer."""
        begin = time.thread_time_ns()
        self._search.run(queries, self._table, self._context, self._out)
        elapsed = time.thread_time_ns() - begin
        return elapsed / 1e9 / LAYERS, float(self._out.keys_read.mean())


def _account(times: dict[int, list[float]], reads: dict[int, list[float]], report: Report) -> None:
    print(f"{'tokens':>10}{'keys read':>12}{'of all':>9}{'us a row and layer':>20}{'growth':>8}")
    before = None
    for length in times:
        median, read = statistics.median(times[length]), statistics.median(reads[length])
        growth = median / before if before else float("nan")
        print(f"{length:>10,}{read:>12,.0f}{read / length:>9.2%}{1e6 * median:>20,.1f}{growth:>8.2f}")
        report.figures[f"keys_read/{length}"] = read
        report.figures[f"time_us/{length}"] = 1e6 * median
        report.ci[f"time_us/{length}"] = bootstrap(
            {str(index): [1e6 * elapsed] for index, elapsed in enumerate(times[length])}, report.seed, statistics.median
        )
        if before and length > GROWTH_FROM:
            report.figures[f"growth/{length}"] = growth
            report.must[f"growth/{length}"] = ("<=", 1.3)
        before = median
    longest = max(times)
    report.figures[f"share_read/{longest}"] = statistics.median(reads[longest]) / longest
    if longest >= LONGEST:
        report.must[f"share_read/{longest}"] = ("<=", 0.005)
    index = summary_bytes(
        SearchConfig(strategy="beam"),
        PAGE_SIZE,
        LONGEST // PAGE_SIZE,
        LONGEST,
        INDEX_LAYERS,
        INDEX_KV_HEADS,
        INDEX_HEAD_DIM,
    )
    report.figures["index_gib"] = index / 2**30
    report.must["index_gib"] = ("<=", 1.2)
    print(
        f"index of {LONGEST:,} tokens, {INDEX_LAYERS} layers, {INDEX_KV_HEADS} KV heads, head size {INDEX_HEAD_DIM}: "
        f"{report.figures['index_gib']:.3f} GiB"
    )


Keys = tuple[torch.Tensor, float, Iterator[torch.Tensor]]
"""Queries [QUERIES, G, H / G, D], the scale of their logits, and keys in chunks [G, CHUNK, D]."""


def _random_walk(seed: int, tokens: int) -> Keys:
    """Keys that drift: one walk per KV head, pulled back to the origin, and noise on every token.

    A query looks for a few places of the context: its heads' vectors are sums of keys drawn from it, and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    pull = 0.98
    steps = torch.randn(tokens // SEGMENT, KV_HEADS, HEAD_DIM, generator=generator) * (1 - pull**2) ** 0.5
    place = torch.randn(KV_HEADS, HEAD_DIM, generator=generator)
    walk = torch.empty(KV_HEADS, tokens // SEGMENT, HEAD_DIM)
    for index, step in enumerate(steps):
        place = pull * place + step
        walk[:, index] = place
    # Within the shortest context, so that every length has what the queries look for.
    wanted = torch.randint(SHORTEST // SEGMENT, (QUERIES, KV_HEADS, GROUP, 3), generator=generator)
    heads = torch.arange(KV_HEADS)[:, None, None]
    queries = walk[heads, wanted].sum(3) + torch.randn(QUERIES, KV_HEADS, GROUP, HEAD_DIM, generator=generator)

    def chunks() -> Iterator[torch.Tensor]:
        for first in range(0, tokens, CHUNK):
            slow = walk[:, first // SEGMENT : (first + CHUNK) // SEGMENT].repeat_interleave(SEGMENT, 1)
            noise = torch.randn(slow.shape, generator=generator)
            yield (slow + 0.5 * noise)[:, : tokens - first].bfloat16()

    return queries.bfloat16(), HEAD_DIM**-0.5, chunks()


def _attention(model: Path, text: str, seed: int, traces: Path | None) -> Attention:
    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} is not the folder of a model")
    try:
        ids = token_ids(load_tokenizer(model), text, SOURCE, seed, traces)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return of_text(model, ids)


def _repeated(attention: Attention, seed: int, tokens: int) -> Keys:
    """The keys of the middle layer over and over, each copy with noise of a quarter of a channel's deviation."""
    generator = torch.Generator().manual_seed(seed)
    layer = len(attention.keys) // 2
    keys = attention.keys[layer].float()
    deviation = keys.std(1, keepdim=True)
    rows = attention.queries[layer].unflatten(1, (len(keys), -1))
    queries = rows[torch.arange(QUERIES) % len(rows)]

    def chunks() -> Iterator[torch.Tensor]:
        for first in range(0, tokens, CHUNK):
            place = torch.arange(first, min(first + CHUNK, tokens)) % keys.shape[1]
            copy = keys[:, place]
            yield (copy + 0.25 * deviation * torch.randn(copy.shape, generator=generator)).bfloat16()

    return queries.contiguous(), attention.scale, chunks()


if __name__ == "__main__":
    run(main)
