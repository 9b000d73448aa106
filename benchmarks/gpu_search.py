"""What the search costs on a GPU: its time over that of vLLM's Triton attention on the same step and layers.

For each batch, context and group of query heads one decoding step is made up: bfloat16 caches of pages of 16, keys that
gather in topics, queries that look for a few of them. Search and attention are captured in one CUDA graph each and
replayed in turn with a cold second-level cache. `search/attention` is the quotient of the median times; `reads` the
keys and summary vectors that the search read over all keys; `bandwidth` what it read per second, over that of a copy on
the same GPU; `most` the quotient when the search never stops early, whatever the keys. `of all ... layers' attention`
is what the search of the layers that a plug-in watches costs beside the attention of a whole model.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import typer

from benchmarks.report import Report, run
from stream_kernels.gpu import GpuSearch
from stream_kernels.gpu_result import DeviceSummary
from stream_kernels.index import levels_for
from stream_kernels.layout import DeviceKeys
from stream_kernels.search import SearchConfig
from stream_kernels.statistics import FANOUT

BATCHES = (1, 8, 64)
CONTEXTS = (4096, 32768, 131072)
GROUPS = (4, 7)
MUSTS = {32768: 0.08, 131072: 0.03}
KV_HEADS, HEAD_DIM, PAGE = 8, 128, 16
WATCHED_LAYERS = 4
"""As many as the plug-in watches by default, and of MODEL_LAYERS that a model may have."""
MODEL_LAYERS = 28
TOPIC_TOKENS = 512
CONFIG = SearchConfig(strategy="beam")
DEVICE = "cuda"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Step:
    """One decoding step: caches [2, pages, PAGE, KV_HEADS, HEAD_DIM] by layer, queries [L, rows, H, D]."""

    caches: list[torch.Tensor]
    queries: torch.Tensor
    block_table: torch.Tensor
    context_lens: torch.Tensor
    context: int
    scale: float

    @property
    def rows(self) -> int:
        return len(self.context_lens)


def make_step(layers: int, batch: int, context: int, group: int, device: str, rng: torch.Generator) -> Step:
    """Every run of TOPIC_TOKENS tokens has a topic: a direction that its keys share. Queries look for two topics."""
    pages = context // PAGE
    table = torch.randperm(batch * pages, generator=rng, device=device).int().view(batch, pages)
    topics = -(-context // TOPIC_TOKENS)
    caches, queries = [], []
    for _ in range(layers):
        cache = torch.empty(2, batch * pages, PAGE, KV_HEADS, HEAD_DIM, dtype=DTYPE, device=device)
        looked_for = []
        for row in range(batch):
            topic = torch.randn(topics, KV_HEADS, HEAD_DIM, generator=rng, device=device)
            keys = torch.randn(context, KV_HEADS, HEAD_DIM, generator=rng, device=device) * 0.8
            keys += 0.6 * topic.repeat_interleave(TOPIC_TOKENS, 0)[:context]
            cache[0, table[row].long()] = keys.view(pages, PAGE, KV_HEADS, HEAD_DIM).to(DTYPE)
            cache[1, table[row].long()] = keys.view(pages, PAGE, KV_HEADS, HEAD_DIM).to(DTYPE)
            chosen = torch.randint(topics, (2, KV_HEADS * group), generator=rng, device=device)
            head = torch.arange(KV_HEADS * group, device=device) // group
            noise = torch.randn(KV_HEADS * group, HEAD_DIM, generator=rng, device=device)
            looked_for.append(topic[chosen, head].sum(0) + noise)
        caches.append(cache)
        queries.append(torch.stack(looked_for))
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    return Step(caches, torch.stack(queries).to(DTYPE), table, lens, context, HEAD_DIM**-0.5)


def prepare_search(step: Step, config: SearchConfig, programs: int | None) -> tuple[Callable[[], None], DeviceSummary]:
    """A search of the step whose summaries are built, and where its results go."""
    device = step.queries.device
    blocks = step.context // config.block_size
    levels = levels_for(config, step.context).count
    nodes = [blocks // FANOUT**level for level in range(levels)]
    offsets = [sum(nodes[:level]) for level in range(levels + 1)]
    slots = torch.arange(step.rows * offsets[-1], dtype=torch.int32, device=device).view(step.rows, -1)
    searcher = GpuSearch(
        [DeviceKeys(cache[0], step.scale) for cache in step.caches],
        step.queries.shape[2],
        config,
        max_rows=step.rows,
        max_context=step.context,
        query_dtype=DTYPE,
        summary_slots=slots.numel(),
        level_offsets=offsets,
        max_programs=programs,
    )
    tables = step.block_table[None]
    level = torch.repeat_interleave(torch.arange(levels), torch.tensor(nodes)).expand(step.rows, -1).int()
    node = torch.cat([torch.arange(count) for count in nodes]).expand(step.rows, -1).int()
    row = torch.arange(step.rows)[:, None].expand_as(level).int()
    jobs = torch.stack([level.to(device), slots, row.to(device), node.to(device)], -1).view(-1, 4)
    searcher.update(jobs, torch.tensor([len(jobs)], dtype=torch.int32, device=device), tables, slots)
    rows = torch.tensor([step.rows], dtype=torch.int32, device=device)
    out = searcher.allocate_result()
    return lambda: searcher.run(step.queries, tables, step.context_lens, rows, out, slots), out


def prepare_attention(step: Step) -> Callable[[], None]:
    """vLLM's decode attention over the same layers, as its Triton backend calls it."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    heads, device = step.queries.shape[2], step.queries.device
    # Sizes of the backend: below 128 programs it splits the context into 16 segments.
    threshold, segments = 128 // KV_HEADS, 16
    partial = torch.empty(threshold, heads, segments, HEAD_DIM, device=device)
    peak, total = torch.empty(2, threshold, heads, segments, device=device)
    starts = torch.arange(step.rows + 1, dtype=torch.int32, device=device)
    out = torch.empty_like(step.queries[0])

    def attend() -> None:
        for layer, cache in enumerate(step.caches):
            unified_attention(
                q=step.queries[layer],
                k=cache[0],
                v=cache[1],
                out=out,
                cu_seqlens_q=starts,
                max_seqlen_q=1,
                seqused_k=step.context_lens,
                max_seqlen_k=step.context,
                softmax_scale=step.scale,
                causal=True,
                window_size=(-1, -1),
                block_table=step.block_table,
                softcap=0,
                q_descale=None,
                k_descale=None,
                v_descale=None,
                seq_threshold_3D=threshold,
                num_par_softmax_segments=segments,
                softmax_segm_output=partial,
                softmax_segm_max=peak,
                softmax_segm_expsum=total,
            )

    return attend


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`work` as a CUDA graph, after one run that compiles it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def median_times(works: list[Callable[[], None]], repeats: int) -> list[float]:
    """Median seconds of each, run in turn, each after the second-level cache was overwritten."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, own in zip(works, times, strict=True):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            own.append(start.elapsed_time(end) / 1000)
    return [statistics.median(own) for own in times]


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    (seconds,) = median_times([copy], repeats)
    return 2 * source.numel() / seconds


def free_memory() -> int:
    """Bytes to be had on the device."""
    return int(torch.cuda.mem_get_info()[0])


def main(
    batches: Annotated[list[int], typer.Option("--batch")] = list(BATCHES),  # noqa: B006
    contexts: Annotated[list[int], typer.Option("--context")] = list(CONTEXTS),  # noqa: B006
    groups: Annotated[list[int], typer.Option("--group")] = list(GROUPS),  # noqa: B006
    repeats: int = 50,
    watched: Annotated[
        int, typer.Option("--layers", help="Layers that are searched and attended to.")
    ] = WATCHED_LAYERS,
    programs: Annotated[
        int | None, typer.Option(help="Bound of the search's grid: 33 is what a plug-in has of an H100 or H200.")
    ] = None,
    seed: int = 0,
) -> None:
    """Compares the search with vLLM's attention on made-up steps; needs a GPU, and vLLM built for it."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("the benchmark needs a GPU, and there is none")
    if wrong := [context for context in contexts if context < 1 or context % PAGE]:
        raise typer.BadParameter(f"--context is {wrong[0]}; it must be a multiple of {PAGE}, the tokens of a page")
    rng = torch.Generator(DEVICE).manual_seed(seed)
    copied = copy_bandwidth(repeats)
    layers_used: dict[str, int] = {}
    config = {
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "page": PAGE,
        "search": vars(CONFIG),
        "programs": programs,
        "layers": layers_used,
    }
    report = Report("gpu_search", config, seed, repeats)
    report.figures["copy_bytes_per_second"] = copied
    same = True
    for context in contexts:
        worst = 0.0
        for batch in batches:
            # As many of the watched layers as memory has room for.
            layers = min(watched, int(0.7 * free_memory() / (batch * context * KV_HEADS * HEAD_DIM * 4)))
            layers_used[f"{batch}x{context}"] = layers
            for group in groups if layers else ():
                name = f"batch {batch}, context {context}, group {group}"
                step = make_step(layers, batch, context, group, DEVICE, rng)
                search, out = prepare_search(step, CONFIG, programs)
                # Graphs hold addresses: what they work on must outlive them.
                works = [
                    search,
                    prepare_attention(step),
                    prepare_search(step, replace(CONFIG, min_gain=0.0), programs)[0],
                ]
                search()
                eager = out.storage.clone()
                graphs = [captured(work) for work in works]
                out.storage.zero_()
                graphs[0].replay()
                same = same and torch.equal(eager, out.storage)
                read = float(out.unit_keys_read.double().sum())
                search_time, attention_time, most_time = median_times([graph.replay for graph in graphs], repeats)
                ratio = search_time / attention_time
                worst = max(worst, ratio)
                report.figures |= {
                    f"search_seconds, {name}": search_time,
                    f"search/attention, {name}": ratio,
                    f"of all {MODEL_LAYERS} layers' attention, {name}": ratio * layers / MODEL_LAYERS,
                    f"most, {name}": most_time / attention_time,
                    f"reads, {name}": read / (layers * batch * context * KV_HEADS),
                    f"bandwidth, {name}": read * HEAD_DIM * 2 / search_time / copied,
                }
                print(f"{name}: {search_time * 1e6:.0f} us, {ratio:.3f} of attention", flush=True)
                del graphs, works, step, search, out
                torch.cuda.empty_cache()
        report.figures[f"search/attention at {context}"] = worst
    report.figures["graph_replay_gives_the_same"] = float(same)
    report.must = {f"search/attention at {context}": ("<=", bound) for context, bound in MUSTS.items()}
    report.must["graph_replay_gives_the_same"] = (">=", 1.0)
    report.finish()


if __name__ == "__main__":
    run(main)
