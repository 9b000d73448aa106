"""Summaries count as valid only where they are right, whatever an engine does with its KV blocks.

A model of the engine's block pool, and vLLM's own scheduler, go through random histories. Every step tells the worker
what a SchedulerOutput tells; after every search, and for every request after every step, each summary that the index
holds valid is compared with one made from scratch.
"""

import hashlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from stream_kernels.cpu import ROW_OK, ROW_RACED
from stream_kernels.cpu_kernel.device_nodes import resolve_rows
from stream_kernels.index import allocate_index, levels_for
from stream_kernels.search import SearchConfig

from .engine_history import EngineHistory
from .paged_worker import PREFIXES, ROWS, Shape, Worker

VOCABULARY = 64
REAL_STEPS = 150

SHAPES = {
    "page 16, block 8": Shape(16, 8),
    "page 16, two to a block": Shape(16, 32),
    "page 16, eight to a block": Shape(16, 128, connector=True),
    "page 32, channel pairs": Shape(32, 16, token_group=16, channel_pack=2, kv_heads=2),
    "page 64": Shape(64, 8, token_group=64, dtype=torch.float32),
    "page 64, a connector": Shape(64, 16, token_group=64, connector=True, sink_blocks=2),
    "page 128": Shape(128, 16, token_group=128, sink_blocks=0),
    "page 128, little room": Shape(128, 16, small_index=True),
    "page 16, little room, a connector": Shape(16, 16, small_index=True, connector=True),
    "page 48, three to a page": Shape(48, 16),
    "page 48, three to two pages": Shape(48, 32),
    "two groups": Shape(32, 8, groups=2, watched=(0, 1)),
    "three groups, one not watched": Shape(16, 16, groups=3, watched=(0, 2), dtype=torch.float16),
    "two groups, two pages to a block, little room": Shape(16, 32, groups=2, watched=(1, 0), small_index=True),
}


@pytest.fixture(scope="module", autouse=True)
def _ready() -> None:
    """Imports the engine and compiles before the first test's clock starts."""
    import vllm.v1.core.sched.scheduler  # noqa: F401

    worker = Worker(Shape(16, 8))
    worker.check_summaries([np.arange(2, dtype=np.int32)], np.zeros(32, np.int64), 0)


@pytest.mark.parametrize("name", SHAPES)
def test_summaries_are_right_in_every_history(name: str) -> None:
    """A history of the pool's model; `Shape` has what differs from engine to engine."""
    run_state_machine_as_test(
        lambda: EngineHistory(SHAPES[name]),
        settings=settings(
            max_examples=10,
            stateful_step_count=60,
            deadline=None,
            # Shrinking takes minutes, and the suite's limit on a test would cut it off together with the report.
            phases=[Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def step_of(new: dict[str, tuple[list[int], int, int]], finished: frozenset[str] = frozenset()) -> SimpleNamespace:
    """A SchedulerOutput of new requests alone: for each its pages, computed and scheduled tokens."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=[0] * (computed + tokens),
                sampling_params=None,
                block_ids=(pages,),
                num_computed_tokens=computed,
            )
            for name, (pages, computed, tokens) in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[], resumed_req_ids=set(), num_computed_tokens=[], num_output_tokens=[], new_block_ids=[]
        ),
        num_scheduled_tokens={name: tokens for name, (_, _, tokens) in new.items()},
        finished_req_ids=finished,
        preempted_req_ids=None,
        new_block_ids_to_zero=None,
        kv_cache_block_copies=None,
        scheduled_spec_decode_tokens={},
    )


def test_a_summary_is_as_old_as_the_oldest_page_it_covers() -> None:
    """The search of a request is overtaken by the next owner of the first page of a block. The block's second page
    stays in the prefix cache, and later stands behind another page with the first one's content."""
    worker = Worker(Shape(16, 32))
    own, other = np.arange(256), np.arange(1000, 1016)
    worker.execute(step_of({"a": (list(range(1, 17)), 0, 256)}), {"a": own})
    worker.execute(step_of({"b": ([3], 0, 16)}, frozenset("a")), {"b": other})
    assert [row.status for row in worker.search_next(overtaken=True)] == [ROW_RACED]
    worker.execute(step_of({"c": ([1, 2, 20], 32, 16)}, frozenset("b")), {"c": own[:48]})
    worker.execute(step_of({"d": ([1, 2, 20, *range(4, 16), 21], 240, 16)}, frozenset("c")), {"d": own})
    for _ in range(3):
        assert [row.status for row in worker.search_next()] == [ROW_OK]


def test_a_summary_whose_page_was_given_away_while_it_was_built_is_forgotten() -> None:
    """Two requests read one prompt in the same step, each into a third page of its own. While the search of one reads,
    its third page gets another owner; then the other's, no younger, stands in front of its fourth."""
    tokens = 120 * 32
    own, last = np.arange(tokens), tokens // 16
    for _ in range(20):
        worker = Worker(Shape(16, 32, kv_heads=8))
        both = {"a": (list(range(1, last + 1)), 0, tokens), "b": ([1, 2, 250], 32, 16)}
        worker.execute(step_of(both), {"a": own, "b": own[:48]})
        worker.search_next_while(partial(worker.give_away, 3))
        pages = [1, 2, 250, *range(4, last), 251]
        worker.execute(step_of({"c": (pages, tokens - 16, 16)}, frozenset("a")), {"c": own})
        assert [row.status for row in worker.search_next()] == [ROW_OK]


REAL = {
    "page 16, two to a block": Shape(16, 32),
    "page 32": Shape(32, 8),
    "page 64, little room": Shape(64, 8, small_index=True),
    "beside sliding-window layers": Shape(16, 8, groups=2, watched=(0,)),
}
WINDOW = 40
"""Tokens of the sliding window, whose pages go to others while requests run."""


def real_scheduler(shape: Shape, folder: Path) -> Any:
    """vLLM's own scheduler and block pool for `shape`, with prefix caching, chunked prefill and too few pages."""
    from transformers import LlamaConfig
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
    from vllm.v1.structured_output import StructuredOutputManager

    LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=shape.max_context,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    cache = CacheConfig(block_size=shape.page_size, enable_prefix_caching=True)
    cache.num_gpu_blocks = shape.pages
    config = VllmConfig(
        model_config=ModelConfig(
            str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=shape.max_context - 1, seed=0
        ),
        cache_config=cache,
        scheduler_config=SchedulerConfig(
            max_num_seqs=ROWS,
            max_num_batched_tokens=30 * shape.block_size,
            max_model_len=shape.max_context - 1,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
    )
    sizes = {"block_size": shape.page_size, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    specs = [FullAttentionSpec(**sizes), SlidingWindowSpec(**sizes, sliding_window=WINDOW)][: shape.groups]
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    return Scheduler(
        config,
        KVCacheConfig(num_blocks=shape.pages, kv_cache_tensors=[], kv_cache_groups=groups),
        StructuredOutputManager(config),
        shape.page_size,
    )


def prefixes(tokens: list[int], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """The prefix of every token, of which the first `known` are as before; int64 [tokens]."""
    found = known.tolist()
    for token in tokens[len(found) :]:
        found.append((1664525 * (found[-1] if found else 0) + 1013904223 + 7919 * token) % (2**31 - 1))
    return np.array(found, np.int64)


@pytest.mark.parametrize("name", REAL)
def test_summaries_are_right_under_the_engines_own_scheduler(name: str, tmp_path: Path) -> None:
    """vLLM's scheduler and KV-cache manager decide: hits, chunks, preemption, eviction, pages behind the window."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request as EngineRequest
    from vllm.v1.request import RequestStatus

    shape, rng = REAL[name], np.random.default_rng(1)
    scheduler, worker = real_scheduler(shape, tmp_path), Worker(shape)
    init_none_hash(repr_hash)
    hasher = get_request_block_hasher(shape.page_size, repr_hash)
    requests: dict[str, Any] = {}
    ids: dict[str, NDArray[np.int64]] = {}
    prompts: list[list[int]] = []
    hits = preemptions = 0
    for step in range(REAL_STEPS):
        if len(requests) < ROWS - 1 and rng.random() < 0.4:
            shared = prompts[rng.integers(len(prompts))] if prompts and rng.random() < 0.7 else []
            length = int(rng.integers(2, (40, 110)[rng.random() < 0.3] * shape.block_size))
            prompt = shared[: rng.integers(0, len(shared) + 1)][:length]
            prompt = prompt + rng.integers(0, VOCABULARY, length - len(prompt)).tolist()
            prompts = [*prompts[-5:], prompt]
            sampling = SamplingParams(max_tokens=int(rng.integers(1, 12 * shape.block_size)), ignore_eos=True)
            request = EngineRequest(f"r{step}", prompt, sampling, None, block_hasher=hasher)
            scheduler.add_request(request)
            requests[request.request_id], ids[request.request_id] = request, np.zeros(0, np.int64)
        if requests and rng.random() < 0.03:
            scheduler.finish_requests(str(rng.choice(list(requests))), RequestStatus.FINISHED_ABORTED)
        if rng.random() < 0.01:
            scheduler.reset_prefix_cache(reset_running_requests=True)
            worker.invalidate()
        output = scheduler.schedule()
        for request_id in output.num_scheduled_tokens:
            ids[request_id] = prefixes(list(requests[request_id].all_token_ids), ids[request_id])
        worker.execute(output, {request_id: known % PREFIXES for request_id, known in ids.items()})
        hits += sum(new.num_computed_tokens > 0 for new in output.scheduled_new_reqs)
        preemptions += len(output.scheduled_cached_reqs.resumed_req_ids)
        computed = {request.request_id: request.num_computed_tokens for request in scheduler.running}
        for request_id in list(output.num_scheduled_tokens)[:2]:
            pages = [np.array(pages, np.int32) for pages in worker.tables[request_id]]
            worker.check_summaries(pages, ids[request_id][: computed[request_id]] % PREFIXES, worker.generations.now)
        order = list(output.num_scheduled_tokens)
        done = [computed[request_id] >= requests[request_id].num_tokens for request_id in order]
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=order,
                req_id_to_index={request_id: i for i, request_id in enumerate(order)},
                sampled_token_ids=[[int(rng.integers(VOCABULARY))] if ready else [] for ready in done],
            ),
        )
        requests = {name: request for name, request in requests.items() if not request.is_finished()}
        for _ in range(rng.integers(0, 3)):
            worker.search_next()
    assert hits
    assert preemptions
    assert worker.compared[1]


def repr_hash(value: Any) -> bytes:
    """A hash of a block's tokens and its prefix."""
    return hashlib.sha256(repr(value).encode()).digest()


def test_rows_that_are_searched_together_take_nothing_from_each_other() -> None:
    """A GPU's rows are all resolved before one is searched; with pages half as long as blocks, what pages hold a node's
    last token changes from request to request, so that in the end every entry is some page's."""
    page, length, count = 16, 60, 64 * 60
    config = SearchConfig(strategy="beam")
    index = allocate_index(config, levels_for(config, page * length), page, count, page * length)
    nodes = int(index.row_offset[-1])
    generations = np.zeros(count, np.int64)
    draw, listed = np.random.default_rng(0), np.zeros((nodes, 3), np.int32)
    stolen = 0
    for step in range(1, 30):
        pages = draw.permutation(count).astype(np.int32).reshape(-1, length)[:50]
        generations[pages] = step
        places = np.array([(row.ctypes.data, length) for row in pages], np.int64)
        ends = np.full(len(pages), length // 2)
        slots, counts = np.full((len(pages), nodes), -1, np.int32), np.zeros(3, np.int64)
        jobs = np.zeros((nodes * len(pages), 4), np.int32)
        index.searches[0] += 1
        snapshots = np.full(len(pages), step)
        resolve_rows(index, 0, places, ends, generations.ctypes.data, count, snapshots, slots, listed, jobs, counts)
        assert counts[0] == len(pages)
        for row, of_row in zip(pages[ends > 0], slots[ends > 0], strict=True):
            owners = index.owner[of_row[1 : length // 2]]
            stolen += int((owners != row[3:length:2]).sum())
        assert counts[2] == 0, "there is room for all: no page is two requests'"
    assert stolen == 0
