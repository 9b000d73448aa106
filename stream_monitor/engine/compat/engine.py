"""The engine as a whole: version and platform, and what rules capture out.

Paths are under `vllm/`, read in 0.32.0.
"""

import os
from typing import Any

TESTED_VERSIONS: dict[str, tuple[str, ...]] = {
    "cpu": ("0.28", "0.29", "0.30", "0.31", "0.32"),
    "cuda": (),
}
"""Platform -> vLLM minor versions. On CPUs the suite runs the last one, and tests/matrix.py the others. On CUDA 0.26
ran with its kernels interpreted (tests/gpu) and 0.32 was read, but nothing has run on a GPU yet: whoever wants it
there has to say so."""

BACKENDS = {
    "cpu": {"CPU_ATTN": "stream_monitor.engine.backends.cpu.StreamCPUAttentionBackend"},
    "cuda": {
        "FLASH_ATTN": "stream_monitor.engine.backends.flash_attn.StreamFlashAttentionBackend",
        "FLASHINFER": "stream_monitor.engine.backends.flashinfer.StreamFlashInferBackend",
        "TRITON_ATTN": "stream_monitor.engine.backends.triton_attn.StreamTritonAttentionBackend",
    },
}
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
    speculates = vllm_config.speculative_config is not None
    versions = TESTED_VERSIONS.get(platform, ())
    tested = any(version.startswith(f"{minor}.") for minor in versions)
    checks: list[tuple[bool, str]] = [
        (
            platform not in BACKENDS,
            f"platform {platform} is not supported by this release; supported: {', '.join(BACKENDS)}",
        ),
        (
            not tested and not allow_untested,
            f"vLLM {version} was not tested with this release (tested: {', '.join(versions) or 'none'}); "
            "STREAM_MONITOR_ALLOW_UNTESTED_ENGINE=1 tries all the same",
        ),
        (
            platform == "cpu" and uses_v2_runner(vllm_config),
            "model runner V2 on CPUs is not supported by this release; VLLM_USE_V2_MODEL_RUNNER=0 selects V1",
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
            platform == "cpu" and bool(getattr(scheduler, "async_scheduling", False)),
            "asynchronous scheduling on CPUs is not supported by this release",
        ),
        (
            speculates and bool(getattr(scheduler, "async_scheduling", False)),
            "speculative decoding with asynchronous scheduling: positions are not known when a step begins; "
            "--no-async-scheduling makes them so",
        ),
        (
            speculates and parallel.pipeline_parallel_size > 1,
            "speculative decoding with pipeline parallelism: only the last stage knows which drafts were accepted",
        ),
        (
            bool(getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False)),
            "kv_sharing_fast_prefill runs reduced query rows",
        ),
    ]
    return tuple(reason for applies, reason in checks if applies)


def uses_v2_runner(vllm_config: Any) -> bool:
    """Whether the engine picks model runner V2 (config/vllm.py `use_v2_model_runner`)."""
    return bool(getattr(vllm_config, "use_v2_model_runner", False))


def model_layers(vllm_config: Any) -> int:
    """Decoder layers of the whole model, of which a pipeline rank has some (config/model.py:1692)."""
    return int(vllm_config.model_config.get_total_num_hidden_layers())


def served_model_name(vllm_config: Any) -> str:
    """The `model_name` label of vLLM's own metrics (v1/metrics/loggers.py)."""
    return str(vllm_config.model_config.served_model_name)


def compute_cpus() -> set[int]:
    """CPUs that vLLM's CPU workers of this host compute on (utils/ompmultiprocessing.py:96).

    This worker's own are its affinity. An explicit binding such as `0-3|4-7` names the other ranks' too; `auto` names
    none.
    """
    cpus = set(os.sched_getaffinity(0))
    binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    for part in binding.replace("|", ",").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def load_tokenizer(vllm_config: Any) -> Any | None:
    """The model's Hugging Face tokenizer; None with skip_tokenizer_init or a tokenizer of another family."""
    from transformers import PreTrainedTokenizerBase
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def kv_size_is_explicit(vllm_config: Any) -> bool:
    """Whether the size of the KV cache was asked for, in bytes or blocks (`determine_available_memory` of the workers
    returns early, v1/core/kv_cache_utils.py overrides)."""
    cache = vllm_config.cache_config
    return cache.kv_cache_memory_bytes is not None or cache.num_gpu_blocks_override is not None


def kv_bytes_per_token(worker: Any) -> float:
    """Bytes that one token takes in this worker's KV cache, over all layers (v1/kv_cache_interface.py)."""
    return float(sum(spec.page_size_bytes / spec.block_size for spec in worker.get_kv_cache_spec().values()))


def free_memory(device: str) -> int:
    """Bytes that are free in the memory of a device: cpu (psutil is vLLM's own) or cuda."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)
