"""Every fact about vLLM's internals that the plug-in relies on, and nothing else.

Paths are under `vllm/`, read in 0.32.0.
"""

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_monitor.engine.plan import LayerFacts

TESTED_VERSIONS = ("0.32",)
"""vLLM minor versions the suite ran against."""

BACKENDS = {"cpu": {"CPU_ATTN": "stream_monitor.engine.backends.cpu.StreamCPUAttentionBackend"}}
"""Platform -> native member of AttentionBackendEnum -> our subclass. The plan refuses a platform that is not here."""

NATIVE_WORKERS = {
    "cpu": "vllm.v1.worker.cpu_worker.CPUWorker",
    "cuda": "vllm.v1.worker.gpu_worker.Worker",
    "rocm": "vllm.v1.worker.gpu_worker.Worker",
    "xpu": "vllm.v1.worker.xpu_worker.XPUWorker",
}


def platform_name() -> str:
    """cpu, cuda, rocm, xpu, ..."""
    from vllm.platforms import current_platform

    return str(current_platform.device_name)


def vllm_version() -> str:
    """Version of the running vLLM."""
    import vllm

    return str(vllm.__version__)


def register_backends() -> None:
    """Put our subclasses over the native backends of this platform (v1/attention/backends/registry.py:340)."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for member, path in BACKENDS.get(platform_name(), {}).items():
        register_backend(AttentionBackendEnum[member], path)


def native_worker_class() -> type:
    """The worker class vLLM would choose by itself (platforms/*.py, `worker_cls == "auto"`)."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    worker: type = resolve_obj_by_qualname(NATIVE_WORKERS[platform_name()])
    return worker


def engine_refusals(vllm_config: Any, allow_untested: bool) -> tuple[str, ...]:
    """Reasons, true of the engine as a whole, why rows could not be labelled or keys not be read correctly."""
    parallel, model, scheduler = vllm_config.parallel_config, vllm_config.model_config, vllm_config.scheduler_config
    version, platform = vllm_version(), platform_name()
    tested = any(version.startswith(f"{minor}.") for minor in TESTED_VERSIONS)
    checks: list[tuple[bool, str]] = [
        (
            platform not in BACKENDS,
            f"platform {platform} is not supported by this release; supported: {', '.join(BACKENDS)}",
        ),
        (
            not tested and not allow_untested,
            f"vLLM {version} was not tested with this release (tested: {', '.join(TESTED_VERSIONS)}); "
            "STREAM_MONITOR_ALLOW_UNTESTED_ENGINE=1 tries all the same",
        ),
        (
            uses_v2_runner(vllm_config),
            "model runner V2 is not supported by this release; VLLM_USE_V2_MODEL_RUNNER=0 selects V1",
        ),
        (model.runner_type != "generate", f"a {model.runner_type} model generates no text"),
        (bool(getattr(model, "is_encoder_decoder", False)), "encoder-decoder models are not supported"),
        (
            getattr(parallel, "decode_context_parallel_size", 1) > 1,
            "decode context parallelism shards the keys of a request",
        ),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "prefill context parallelism shards the keys of a request",
        ),
        (bool(getattr(parallel, "use_ubatching", False)), "dual-batch overlap runs two forward passes per step"),
        (
            bool(getattr(scheduler, "async_scheduling", False)),
            "asynchronous scheduling is not supported by this release",
        ),
        (vllm_config.speculative_config is not None, "speculative decoding is not supported by this release"),
        (
            bool(getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False)),
            "kv_sharing_fast_prefill runs reduced query rows",
        ),
    ]
    return tuple(reason for applies, reason in checks if applies)


def uses_v2_runner(vllm_config: Any) -> bool:
    """Whether the engine picks model runner V2 (config/vllm.py `use_v2_model_runner`)."""
    return bool(getattr(vllm_config, "use_v2_model_runner", False))


def attention_layers(vllm_config: Any) -> list[tuple[LayerFacts, Any]]:
    """Every layer of this rank that keeps something of the context, with its facts
    (model_executor/layers/attention_layer_base.py, model_executor/layers/attention/attention.py)."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index

    from stream_monitor.engine.backends.tap import TappedAttention

    found = []
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if not isinstance(layer, AttentionLayerBase):
            continue  # such as a fused mixture-of-experts layer
        impl = getattr(layer, "impl", None)
        attention = getattr(layer, "attn_type", "decoder")
        facts = LayerFacts(
            name=name,
            index=extract_layer_index(name),
            kind=type(layer).__name__,
            implementation="-" if impl is None else type(impl).__name__,
            query_heads=int(getattr(layer, "num_heads", 0)),
            kv_heads=int(getattr(layer, "num_kv_heads", 0)),
            head_dim=int(getattr(layer, "head_size", 0)),
            scale=float(getattr(impl, "scale", 0.0)),
            tapped=isinstance(impl, TappedAttention),
            attention_type=str(getattr(attention, "value", attention)),
            kv_cache_dtype=str(getattr(layer, "kv_cache_dtype", "auto")),
            sliding_window=_sliding_window(layer),
            alibi=getattr(impl, "alibi_slopes", None) is not None,
            shares_kv_with=getattr(layer, "kv_sharing_target_layer_name", None) or "",
            draft=name.startswith("draft"),
        )
        found.append((facts, layer))
    return found


def _sliding_window(layer: Any) -> int:
    """Window in tokens, 0 for none. The layer says None, its CPU implementation -1 (v1/attention/backends/cpu_attn.py);
    either may have it alone."""
    windows = (getattr(layer, "sliding_window", None), getattr(getattr(layer, "impl", None), "sliding_window", None))
    return max([0, *(window for window in windows if isinstance(window, int))])


def soft_cap(layer: Any) -> float:
    """Bound c of the logits, c * tanh(logit / c), 0 for none (`logits_soft_cap` of the implementation)."""
    return float(getattr(layer.impl, "logits_soft_cap", 0) or 0)


def learned_sinks(layer: Any) -> Any | None:
    """A copy of the learned sink logits of this rank's query heads, float32 [heads]; None for none.

    Call after the weights are in, and again when they were replaced. The engine computes with them in bfloat16 or
    float32, which this copy holds exactly; others it casts to float32 itself.
    """
    sinks = getattr(layer.impl, "sinks", None)
    return None if sinks is None else sinks.detach().float().clone()


def engine_instance(vllm_config: Any, distributed_init_method: str) -> str:
    """One UUID per engine start, equal on all tensor- and pipeline-parallel ranks of an engine core.

    Both ingredients are made anew at each start and are the same for all workers of a core: `instance_id`
    (config/vllm.py) and the rendezvous address. Dense data-parallel engines reset `data_parallel_rank`, not the index.
    """
    parallel = vllm_config.parallel_config
    text = f"{vllm_config.instance_id}|{distributed_init_method}|{parallel.data_parallel_index}"
    return str(uuid.UUID(bytes=hashlib.sha256(text.encode()).digest()[:16], version=4))


def served_model_name(vllm_config: Any) -> str:
    """The `model_name` label of vLLM's own metrics (v1/metrics/loggers.py)."""
    return str(vllm_config.model_config.served_model_name)


@dataclass(frozen=True)
class PagedLayerCache:
    """The KV cache of one layer, a view of [pages, kv_heads, page_size, 2 * head_dim], and the group it belongs to."""

    tensor: Any
    group: int


def layer_caches(runner: Any, names: list[str], static_forward_context: dict[str, Any]) -> list[PagedLayerCache]:
    """Caches of the named layers; call after the final `initialize_kv_cache`.

    Raises:
        ValueError: a cache is not of the packed shape the CPU backend reads (v1/attention/backends/cpu_attn.py).
    """
    groups = {
        name: group_id
        for group_id, group in enumerate(runner.kv_cache_config.kv_cache_groups)
        for name in group.layer_names
    }
    caches = []
    for name in names:
        layer = static_forward_context[name]
        tensor = layer.kv_cache
        if tensor.dim() != 4 or tensor.shape[1] != layer.num_kv_heads or tensor.shape[3] != 2 * layer.head_size:
            raise ValueError(f"unknown KV cache shape {tuple(tensor.shape)} in {name}")
        if tensor.stride()[1:] != (tensor.shape[2] * tensor.shape[3], tensor.shape[3], 1):
            raise ValueError(f"unknown KV cache strides {tensor.stride()} in {name}")
        caches.append(PagedLayerCache(tensor, groups[name]))
    return caches


def tokens_per_block(runner: Any) -> list[int]:
    """Tokens per block, per KV cache group.

    Raises:
        ValueError: the kernels split the scheduler's blocks (v1/worker/utils.py:460), so that their ids differ.
    """
    tokens = [group.kv_cache_spec.block_size for group in runner.kv_cache_config.kv_cache_groups]
    if tokens != [table.block_size for table in runner.input_batch.block_table.block_tables]:
        raise ValueError("the attention kernels split the scheduler's KV blocks")
    return tokens


def table_pages(runner: Any) -> list[int]:
    """Most pages of a request, per KV cache group (v1/worker/block_table.py)."""
    return [table.block_table.np.shape[1] for table in runner.input_batch.block_table.block_tables]


def cpu_cache_writer(layer: Any) -> Callable[[Any, Any, Any], None]:
    """A function (key [tokens, kv_heads, head_dim], cache like a layer's, slots int64 [tokens]) that stores keys as the
    engine does, values zero (v1/attention/backends/cpu_attn.py `do_kv_cache_update`)."""
    import torch

    def write(key: Any, cache: Any, slots: Any) -> None:
        layer.impl.do_kv_cache_update(layer, key, torch.zeros_like(key), cache, slots)

    return write


@dataclass(frozen=True)
class ScheduledRequest:
    """One request of a step as the scheduler sees it.

    Attributes:
        computed_tokens: tokens whose keys were in the cache before this step.
        scheduled_tokens: query tokens of this step, at positions computed_tokens onwards.
        output_tokens: tokens sampled so far, as the scheduler counts them.
        rewritten_blocks: block ids, over all KV cache groups, whose content this step may replace.
    """

    request_id: str
    computed_tokens: int
    scheduled_tokens: int
    output_tokens: int
    rewritten_blocks: tuple[int, ...]


@dataclass(frozen=True)
class NewRequest:
    """What is told once about a request: `scheduled_new_reqs` (v1/core/sched/output.py)."""

    request_id: str
    prompt_token_ids: list[int] | None
    prompt_tokens: int
    extra_args: dict[str, Any] | None


@dataclass(frozen=True)
class ScheduledStep:
    """A SchedulerOutput in our own terms."""

    new: tuple[NewRequest, ...]
    resumed: frozenset[str]
    requests: tuple[ScheduledRequest, ...]
    finished: frozenset[str]
    rewritten_blocks: tuple[int, ...]


def read_schedule(output: Any, block_tokens: list[int], connector: bool) -> ScheduledStep:
    """Translate a SchedulerOutput.

    Args:
        output: vLLM's SchedulerOutput.
        block_tokens: tokens per block, per KV cache group.
        connector: a KV connector may write blocks that count as computed (v1/core/sched/scheduler.py:1085).
    """
    new, requests = [], []
    for data in output.scheduled_new_reqs:
        prompt = data.prompt_token_ids
        embeds = getattr(data, "prompt_embeds", None)
        length = len(prompt) if prompt is not None else (int(embeds.shape[0]) if embeds is not None else 0)
        params = data.sampling_params
        new.append(NewRequest(data.req_id, prompt, length, params.extra_args if params is not None else None))
        rewritten = _blocks_from(data.block_ids, 0 if connector else data.num_computed_tokens, block_tokens)
        requests.append(
            ScheduledRequest(
                data.req_id, data.num_computed_tokens, output.num_scheduled_tokens[data.req_id], 0, tuple(rewritten)
            )
        )
    cached = output.scheduled_cached_reqs
    resumed = frozenset(cached.resumed_req_ids)
    for request_id, computed, outputs, block_ids in zip(
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, cached.new_block_ids, strict=True
    ):
        if block_ids is None:
            rewritten = []
        elif request_id in resumed:
            rewritten = _blocks_from(block_ids, 0 if connector else computed, block_tokens)
        else:
            rewritten = [block for group in block_ids for block in group]
        requests.append(
            ScheduledRequest(request_id, computed, output.num_scheduled_tokens[request_id], outputs, tuple(rewritten))
        )
    other: list[int] = list(output.new_block_ids_to_zero or ())
    for copy in output.kv_cache_block_copies or ():
        other.append(copy.dst_block_id)
    return ScheduledStep(tuple(new), resumed, tuple(requests), frozenset(output.finished_req_ids), tuple(other))


def _blocks_from(block_ids: Iterable[list[int]], computed: int, block_tokens: list[int]) -> list[int]:
    """Blocks at or beyond position `computed`, over all groups."""
    return [
        block for group, tokens in zip(block_ids, block_tokens, strict=True) for block in group[computed // tokens :]
    ]


@dataclass(frozen=True)
class BatchRows:
    """The runner's batch after a forward pass, in row order.

    Attributes:
        request_ids: internal ids.
        block_tables: per KV cache group, int32 [at least rows, pages]; a view of the runner's own buffer.
        page_tokens: per group, tokens per page of that table.
    """

    request_ids: list[str]
    block_tables: list[NDArray[np.int32]]
    page_tokens: list[int]


def read_batch_v1(runner: Any) -> BatchRows:
    """The persistent batch of model runner V1 (v1/worker/gpu_input_batch.py)."""
    batch = runner.input_batch
    tables = batch.block_table.block_tables
    return BatchRows(
        request_ids=list(batch.req_ids),
        block_tables=[table.block_table.np for table in tables],
        page_tokens=[table.block_size for table in tables],
    )


def sampled_tokens(output: Any) -> dict[str, list[int]]:
    """Token ids sampled in a step by request, as a synchronous ModelRunnerOutput has them; {} where there are none."""
    ids = getattr(output, "sampled_token_ids", None)
    request_ids = getattr(output, "req_ids", None)
    if not ids or not request_ids:
        return {}
    return {request_id: list(tokens) for request_id, tokens in zip(request_ids, ids, strict=True) if len(tokens)}


def compute_cpus() -> set[int]:
    """CPUs that vLLM's CPU workers of this host compute on (utils/ompmultiprocessing.py:96).

    This worker's own are its affinity. An explicit binding such as `0-3|4-7` names the other ranks' too; `auto` names
    none.
    """
    import os

    cpus = set(os.sched_getaffinity(0))
    binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    for part in binding.replace("|", ",").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


@dataclass(frozen=True)
class Ranks:
    """Where this worker stands in its engine."""

    tensor: int
    pipeline: int
    last_pipeline: bool


def ranks() -> Ranks:
    """From the process groups (distributed/parallel_state.py)."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    pipeline = get_pp_group()
    return Ranks(get_tensor_model_parallel_rank(), pipeline.rank_in_group, pipeline.is_last_rank)


def sends_tokens() -> bool:
    """Whether this rank reports sampled tokens: the output rank alone (v1/executor/multiproc_executor.py:1057)."""
    here = ranks()
    return here.tensor == 0 and here.last_pipeline


def load_tokenizer(vllm_config: Any) -> Any | None:
    """The model's Hugging Face tokenizer; None with skip_tokenizer_init or a tokenizer of another family."""
    from transformers import PreTrainedTokenizerBase
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def build_on_meta(vllm_config: Any) -> None:
    """Construct the model's layers without memory for weights; fills `static_forward_context`."""
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
        initialize_model(vllm_config)


@contextlib.contextmanager
def single_rank_groups(vllm_config: Any, rendezvous: str) -> Iterator[None]:
    """vLLM's process groups with this process alone in them (distributed/parallel_state.py)."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    with set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, rendezvous, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def kv_size_is_explicit(vllm_config: Any) -> bool:
    """Whether the size of the KV cache was asked for, in bytes or blocks (`determine_available_memory` of the workers
    returns early, v1/core/kv_cache_utils.py overrides)."""
    cache = vllm_config.cache_config
    return cache.kv_cache_memory_bytes is not None or cache.num_gpu_blocks_override is not None


def kv_bytes_per_token(worker: Any) -> float:
    """Bytes that one token takes in this worker's KV cache, over all layers (v1/kv_cache_interface.py)."""
    return float(sum(spec.page_size_bytes / spec.block_size for spec in worker.get_kv_cache_spec().values()))


def free_memory() -> int:
    """Bytes of memory that are free on this machine (psutil is vLLM's own)."""
    import psutil

    return int(psutil.virtual_memory().available)
