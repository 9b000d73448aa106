"""Time of one searched decode step on a CPU, all layers and query heads, over that of the engine's own attention.

Both read the same paged caches, written by the engine's writer, for the same queries, on one thread: vLLM's CPU kernel
for one request's decode step in every layer, and the beam at its defaults over every layer and head, its summaries
built before. They are timed in turn and compared pair by pair. Element types are those the engine may run here.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.attention import Attention, load_tokenizer, of_text
from benchmarks.report import Report, bootstrap, run
from benchmarks.texts import KINDS, token_ids
from stream_kernels.cpu import CpuSearch
from stream_kernels.layout import KeyLayout, PagedKeys, probe_permutation
from stream_kernels.reference import search
from stream_kernels.search import BlockSummary, SearchConfig

PAGE_SIZE = 128
"""Tokens per block of vLLM's CPU cache by default."""

BOUNDS = {16_000: 0.25, 32_000: 0.12}
"""Search time over attention time, by tokens."""

LEAST_SPEEDUP = 20.0
"""Of the compiled search over the reference."""

SOURCE = 8_000
"""Tokens of the text whose keys the default run repeats."""

REFERENCE_LAYERS = 1
"""Layers given to the reference; the compiled search is timed on the same."""


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")] = Path(".cache/models/smollm2"),
    text: Annotated[str, typer.Option(help=f"The text: {', '.join(KINDS)}.")] = "code",
    traces: Annotated[Path | None, typer.Option(help="JSON lines of recorded reasoning, for that text.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Context lengths; 16000 and 32000 by default.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the cache: float32 or bfloat16.")] = "float32",
    pairs: Annotated[int, typer.Option(help="Timed pairs per length.")] = 15,
    seed: Annotated[int, typer.Option(help="Of the text, the pages and the resamples.")] = 0,
    full: Annotated[
        bool, typer.Option("--full", help="Keys of a text of the whole length, instead of one of 8000 tokens repeated.")
    ] = False,
) -> None:
    """Time of a searched step over the engine's attention for the same step."""
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"{dtype!r}; valid: float32, bfloat16", param_hint="--dtype")
    if not (model / "config.json").exists():
        raise typer.BadParameter(f"{model} has no config.json: name the folder of a model", param_hint="--model")
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model)
    report = Report(
        "kernels",
        {"model": model.name, "text": text, "dtype": dtype, "repeated": not full, "page_size": PAGE_SIZE},
        seed,
        pairs,
    )
    for length in tokens or sorted(BOUNDS):
        try:
            ids = token_ids(tokenizer, text, length if full else min(length, SOURCE), seed, traces)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        try:
            step = _step(_repeated(of_text(model, ids), length), getattr(torch, dtype), seed)
        except RuntimeError as error:  # the engine's kernels have not every head size
            raise typer.BadParameter(f"vLLM's CPU attention does not take {model}: {error}") from error
        _measure(report, length, step, pairs)
        if length == min(tokens or BOUNDS):
            _against_reference(report, length, step)
    report.finish()


def _repeated(attention: Attention, tokens: int) -> Attention:
    """The same queries over `tokens` keys: the text's, again and again, ending as the text does."""
    times = -(-tokens // attention.tokens)
    return Attention(attention.queries, attention.keys.repeat(1, 1, times, 1)[:, :, -tokens:], attention.scale)


@dataclass(frozen=True)
class _Step:
    """One decode step of one request.

    Attributes:
        queries: [L, 1, H, D].
        keys: the L layers' caches.
        block_table: int32 [1, pages].
        engine: runs the engine's attention in every layer.
    """

    queries: torch.Tensor
    keys: list[PagedKeys]
    block_table: np.ndarray[Any, np.dtype[np.int32]]
    tokens: int
    engine: Callable[[], None]


def _step(attention: Attention, dtype: torch.dtype, seed: int) -> _Step:
    """The step of the text's last token, its pages in random order, values random."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    current_platform.import_kernels()
    layers, kv_heads, tokens, dim = attention.keys.shape
    heads = attention.queries.shape[2]
    isa = _get_attn_isa(dtype, PAGE_SIZE, dim)
    draw = torch.Generator().manual_seed(seed)
    pages = -(-tokens // PAGE_SIZE)
    table = torch.randperm(pages, generator=draw).int()
    slots = (table.long().repeat_interleave(PAGE_SIZE) * PAGE_SIZE + torch.arange(PAGE_SIZE).repeat(pages))[:tokens]

    def halves(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a cache as the engine's kernels take them (v1/attention/backends/cpu_attn.py)."""
        key, value = cache.view(len(cache), kv_heads, 2 * PAGE_SIZE, dim).chunk(2, dim=2)
        return key, value

    def write_page(keys: torch.Tensor) -> torch.Tensor:
        scratch = torch.zeros(1, kv_heads, PAGE_SIZE, 2 * dim, dtype=dtype)
        where = torch.arange(PAGE_SIZE)
        ops.cpu_attn_reshape_and_cache(keys, torch.zeros_like(keys), *halves(scratch), where, isa)
        return scratch[0, -1].flatten()[: PAGE_SIZE * dim]

    layout = KeyLayout.from_permutation(probe_permutation(write_page, PAGE_SIZE, dim, kv_heads, dtype, dtype))
    keys = []
    for layer in range(layers):
        cache = torch.zeros(pages, kv_heads, PAGE_SIZE, 2 * dim, dtype=dtype)
        values = torch.randn(tokens, kv_heads, dim, generator=draw).to(dtype)
        own = attention.keys[layer].transpose(0, 1).to(dtype).contiguous()
        ops.cpu_attn_reshape_and_cache(own, values, *halves(cache), slots, isa)
        keys.append(PagedKeys(cache, layout, attention.scale))
    queries = attention.queries[:, -1:].to(dtype).contiguous()
    out = torch.empty(1, heads, dim, dtype=dtype)
    length, start = torch.tensor([tokens], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)

    def engine() -> None:
        plan = ops.cpu_attn_get_scheduler_metadata(
            1, heads, kv_heads, dim, length, dtype, start, True, -1, isa, enable_kv_split=True
        )
        for query, layer in zip(queries, keys, strict=True):
            key, value = halves(layer.tensor)
            ops.cpu_attention_with_kv_cache(
                query, key, value, out, start, length, layer.scale, True, None, -1, table[None], 0.0, plan, None
            )

    return _Step(queries, keys, table.numpy()[None], tokens, engine)


def _searcher(step: _Step, layers: int, config: SearchConfig) -> tuple[Callable[[], None], BlockSummary]:
    """A call that searches the first `layers` layers of the step, run once so that summaries are built."""
    heads = step.queries.shape[2]
    searcher = CpuSearch(
        step.keys[:layers], heads, config, max_rows=1, max_context=step.tokens, query_dtype=step.queries.dtype
    )
    out = BlockSummary.allocate(layers, 1, heads, config)
    context = np.array([step.tokens], np.int32)

    def searched() -> None:
        searcher.run(step.queries[:layers], [step.block_table], context, out)

    searched()
    return searched, out


def _seconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _measure(report: Report, tokens: int, step: _Step, pairs: int) -> None:
    searched, out = _searcher(step, len(step.keys), SearchConfig(strategy="beam"))
    step.engine()
    timed = [(_seconds(step.engine), _seconds(searched)) for _ in range(pairs)]
    ratios = [search_time / engine_time for engine_time, search_time in timed]
    name = f"search_over_attention_{tokens}"
    report.figures[name] = statistics.median(ratios)
    report.ci[name] = bootstrap({str(i): [ratio] for i, ratio in enumerate(ratios)}, report.seed, statistics.median)
    report.figures[f"attention_ms_{tokens}"] = 1e3 * statistics.median(engine_time for engine_time, _ in timed)
    report.figures[f"search_ms_{tokens}"] = 1e3 * statistics.median(search_time for _, search_time in timed)
    report.figures[f"keys_read_share_{tokens}"] = float(out.keys_read.mean()) / tokens
    if tokens in BOUNDS:
        report.must[name] = ("<=", BOUNDS[tokens])
    print(
        f"{tokens} tokens: attention {report.figures[f'attention_ms_{tokens}']:.1f} ms, search "
        f"{report.figures[f'search_ms_{tokens}']:.1f} ms, median of paired ratios {report.figures[name]:.3f}",
        flush=True,
    )


def _against_reference(report: Report, tokens: int, step: _Step) -> None:
    config = SearchConfig(strategy="beam")
    searched, _ = _searcher(step, REFERENCE_LAYERS, config)
    tables, lens = [torch.from_numpy(step.block_table)], torch.tensor([tokens])

    def reference() -> None:
        search(step.queries[:REFERENCE_LAYERS], step.keys[:REFERENCE_LAYERS], tables, lens, config)

    slow = statistics.median(_seconds(reference) for _ in range(3))
    fast = statistics.median(_seconds(searched) for _ in range(15))
    report.figures["reference_over_search"] = slow / fast
    report.must["reference_over_search"] = (">=", LEAST_SPEEDUP)


if __name__ == "__main__":
    run(main)
