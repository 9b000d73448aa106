"""Builds the capture of one worker, by stations: plan at load, bind to the KV cache, arm after warm-up, close."""

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from stream_kernels.index import summary_bytes
from stream_kernels.search import SearchConfig
from stream_monitor import __version__
from stream_monitor.config import CaptureSettings, SettingsError, load
from stream_monitor.engine.binding import Binding
from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.bystander import NoDevice
from stream_monitor.engine.capture import Capture
from stream_monitor.engine.channels import Channels
from stream_monitor.engine.compat import engine as compat
from stream_monitor.engine.compat import layers as layer_facts
from stream_monitor.engine.compat import parallel
from stream_monitor.engine.compat import runner as runners
from stream_monitor.engine.compat.runner_v1 import RunnerV1
from stream_monitor.engine.compat.runner_v2 import RunnerV2
from stream_monitor.engine.cpu.device import CpuDevice
from stream_monitor.engine.estimator import Estimator
from stream_monitor.engine.governor import Governor
from stream_monitor.engine.hooks import install_runner_hooks, install_worker_hooks
from stream_monitor.engine.ledger import merged
from stream_monitor.engine.marks import Marks
from stream_monitor.engine.plan import CapturePlan, make_plan, target_refusals
from stream_monitor.engine.prompt_rows import room
from stream_monitor.engine.requests import RequestTable
from stream_monitor.engine.search_settings import search_config
from stream_monitor.engine.vocabulary import PromptRoles, token_flags
from stream_monitor.publisher.launch import PublisherProcess
from stream_monitor.records import EngineInfo, Geometry, Ledger
from stream_monitor.ring import RingWriter

if TYPE_CHECKING:
    from stream_monitor.engine.gpu.device import GpuDevice

log = logging.getLogger("vllm.stream_monitor")

_SAMPLE_PAGES = 4096
"""Pages of an imagined cache, to learn what summaries take per page."""

DRAIN_SECONDS = 5.0
"""Longest time `close` waits for the estimator."""


class Installation:
    """What was installed into one worker."""

    def __init__(self, worker: Any, settings: CaptureSettings, plan: CapturePlan, layers: list[Any]) -> None:
        self._worker = worker
        self._settings = settings
        self.capture_plan = plan
        self._layers = layers
        runner = worker.model_runner
        self._runner = RunnerV2(runner) if compat.uses_v2_runner(worker.vllm_config) else RunnerV1(runner)
        self._device = NoDevice() if plan.bystander else self._make_device()
        self._capture: Capture | None = None
        self._estimator: Estimator | None = None
        self._ring: RingWriter | None = None
        self._publisher: PublisherProcess | None = None
        self._search_config = search_config(settings)
        self._kv_tokens_lost = 0
        self.left_for_cache = 0
        # Asked for at once: on several hosts the ranks wait for the first one's word.
        self._instance = parallel.engine_instance(worker.vllm_config, worker.distributed_init_method)

    @classmethod
    def plan(cls, worker: Any) -> "Installation | None":
        """Decide what to capture; None, with every reason in the log, if that is nothing."""
        try:
            settings = load(CaptureSettings)
            if settings.disable:
                return None
            config = worker.vllm_config
            found = layer_facts.attention_layers(config)
            refusals = compat.engine_refusals(config, settings.allow_untested_engine)
            refusals += target_refusals(parallel.hosts(), settings.target)
            pipeline = config.parallel_config.pipeline_parallel_size > 1
            plan = make_plan(
                [facts for facts, _ in found], refusals, settings, compat.model_layers(config) if pipeline else 0
            )
        except SettingsError as error:
            log.error("Stream Monitor: capture is off, serving goes on: %s", error)
            return None
        if plan.bystander:
            log.warning(
                "Stream Monitor: this pipeline rank watches none of its layers, it tells of requests alone%s",
                "".join(f"\n  - refused {reason}" for reason in plan.reasons),
            )
            return cls(worker, settings, plan, [])
        if not plan.watched:
            log.error("Stream Monitor: nothing can be captured:%s", "".join(f"\n  - {r}" for r in plan.reasons))
            return None
        layer_of = {facts.name: layer for facts, layer in found}
        installation = cls(worker, settings, plan, [layer_of[planned.facts.name] for planned in plan.watched])
        log.info(
            "Stream Monitor: watching layers %s, %d query heads each%s",
            [planned.facts.index for planned in plan.watched],
            len(plan.watched[0].query_heads),
            "".join(f"\n  - refused {reason}" for reason in plan.reasons),
        )
        return installation

    def charge(self, available: int) -> None:
        """Set aside the block summaries' part of the `available` bytes for the KV cache, in `left_for_cache`.

        Only where vLLM sizes the cache itself: a size that was asked for is left alone, and the summaries then come
        from free memory (see `bind`).
        """
        self.left_for_cache = available
        config = self._worker.vllm_config
        if self._search_config.strategy != "beam" or compat.kv_size_is_explicit(config) or self.capture_plan.bystander:
            return
        page = config.cache_config.block_size
        cache = compat.kv_bytes_per_token(self._worker)
        summaries = self._summary_bytes(page, _SAMPLE_PAGES) / (_SAMPLE_PAGES * page)
        self.left_for_cache = int(available * cache / (cache + summaries))
        self._kv_tokens_lost = int((available - self.left_for_cache) / cache)
        log.info(
            "Stream Monitor: block summaries take %.1f%% of the KV cache's memory, %d tokens of its capacity",
            100 * (1 - self.left_for_cache / available),
            self._kv_tokens_lost,
        )

    def _summary_bytes(self, page: int, pages: int) -> int:
        facts, context = self.capture_plan.watched[0].facts, self._worker.vllm_config.model_config.max_model_len
        layers = len(self.capture_plan.watched)
        return summary_bytes(self._search_config, page, pages, context, layers, facts.kv_heads, facts.head_dim)

    def _without_room_for_summaries(self, page: int, pages: int) -> SearchConfig:
        """The configured search, or the stateless one where memory that was not set aside is not free either."""
        config = self._search_config
        if config.strategy != "beam" or self._kv_tokens_lost:
            return config
        needed, free = self._summary_bytes(page, pages), compat.free_memory(compat.platform_name())
        if needed <= free // 2:
            return config
        log.warning(
            "Stream Monitor: block summaries need %d MiB and %d MiB are free (half may be taken): strategy descent is "
            "used instead of beam. Give the KV cache less memory, or watch fewer layers",
            needed >> 20,
            free >> 20,
        )
        return replace(config, strategy="descent")

    def _make_device(self) -> "CpuDevice | GpuDevice":
        config, settings = self._worker.vllm_config, self._settings
        query_len = runners.decode_query_len(config)
        if compat.platform_name() == "cpu":
            return CpuDevice(self._layers, query_len, settings.prompt_stride)
        from stream_monitor.engine.gpu.device import GpuDevice

        requests = runners.max_requests(self._worker.model_runner)
        dtype = layer_facts.query_type(self._layers[0], config.model_config.dtype)
        return GpuDevice(
            self._layers,
            self._runner,
            requests,
            query_len,
            dtype,
            settings.gpu_share,
            settings.prompt_stride,
            config.scheduler_config.max_num_batched_tokens,
        )

    def bind(self) -> None:
        """Build the search over the allocated KV cache, check it there against dense attention, install the hooks."""
        worker, settings = self._worker, self._settings
        generations = BlockGenerations(worker.model_runner.kv_cache_config.num_blocks)
        key_bytes = self._bind_device(generations) if self.capture_plan.watched else 0
        self.search = self._device.search
        heads_per_row = len(self.capture_plan.watched) * len(self._query_heads)
        self._capture = Capture(
            self._runner,
            worker.vllm_config.kv_transfer_config is not None,
            self._device,
            self._request_table(),
            generations,
            heads_per_row,
            Governor(settings.max_overhead),
        )
        self._ring = RingWriter(settings.ring_bytes)
        self._estimator = Estimator(
            self.search,
            heads_per_row,
            key_bytes,
            self._ring,
            settings.audit_every,
            self._free_cpus(),
            self._capture.release,
            self._capture.report,
            self._publisher_alive,
        )
        install_runner_hooks(worker.model_runner, self._capture)
        install_worker_hooks(worker, self._capture, self._take_logit_weights)

    def _bind_device(self, generations: BlockGenerations) -> int:
        """Bind the device to the watched layers' caches; bytes of one key of one KV head."""
        worker, settings, watched = self._worker, self._settings, self.capture_plan.watched
        facts, config = watched[0].facts, worker.vllm_config
        on_cpu = compat.platform_name() == "cpu"
        caches = layer_facts.layer_caches(
            worker.model_runner,
            [planned.facts.name for planned in watched],
            config.compilation_config.static_forward_context,
            contiguous_tiles=on_cpu,
        )
        _, _, page, _ = caches[0].tensor.shape
        self._search_config = self._without_room_for_summaries(page, min(len(cache.tensor) for cache in caches))
        if not on_cpu and self._search_config.strategy == "beam" and len({cache.group for cache in caches}) > 1:
            log.warning(
                "Stream Monitor: the watched layers are of several KV cache groups, for which there are no block "
                "summaries on a GPU: strategy descent is used instead of beam. Watch layers of one group"
            )
            self._search_config = replace(self._search_config, strategy="descent")
        last_rows = runners.max_requests(worker.model_runner) * runners.decode_query_len(config)
        binding = Binding(
            self._runner,
            self._layers,
            caches,
            facts.query_heads,
            self._query_heads,
            last_rows + room(config.scheduler_config.max_num_batched_tokens, settings.prompt_stride),
            config.model_config.max_model_len,
            config.model_config.dtype,
            layer_facts.query_type(self._layers[0], config.model_config.dtype),
            generations,
        )
        assert not isinstance(self._device, NoDevice)
        self._device.bind(binding, self._search_config, settings.queue_steps)
        return int(facts.head_dim * caches[0].tensor.element_size())

    @property
    def _query_heads(self) -> tuple[int, ...]:
        """Watched in each layer of this rank."""
        watched = self.capture_plan.watched
        return watched[0].query_heads if watched else ()

    def arm(self) -> None:
        """Start the estimator thread and the publisher, and begin to capture."""
        assert self._capture is not None
        assert self._estimator is not None
        assert self._ring is not None
        self._publisher = PublisherProcess(
            self._ring.fd, self._engine_info(), self._settings.monitor(), self._free_cpus()
        )
        self._publisher.start()
        self._estimator.start()
        self._capture.arm(self._estimator)

    def close(self) -> None:
        """Let everything captured reach the ring and the publisher, then release both."""
        if self._capture is None or self._estimator is None or self._publisher is None or self._ring is None:
            return
        self._capture.close()
        self._estimator.stop(DRAIN_SECONDS)
        self._publisher.stop(DRAIN_SECONDS)
        self._ring.close()
        self._publisher = None

    def pause(self, paused: bool) -> None:
        """Refuse rows for the time being (`paused`), or capture again. On the runner thread."""
        if self._capture is not None:
            self._capture.paused = paused

    def status(self) -> dict[str, Any]:
        """Plain values for people, benchmarks and tests."""
        capture, estimator = self._capture, self._estimator
        ledger = merged(capture.ledger, estimator.ledger) if capture and estimator else Ledger()
        return {
            "capturing": capture is not None and not capture.fault,
            "reason": capture.fault if capture else "",
            "layers": [planned.facts.index for planned in self.capture_plan.watched],
            "query_heads": list(self._query_heads),
            "instance": self._instance,
            "refused": list(self.capture_plan.reasons),
            "backlog": estimator.backlog if estimator else 0,
            "strategy": self._search_config.strategy,
            "kv_tokens_lost": self._kv_tokens_lost,
            "device_waits": self._device.waits,
            "publisher": self._publisher.trouble if self._publisher else "",
            "publisher_restarts": self._publisher.restarts if self._publisher else 0,
            "paused": capture is not None and capture.paused,
            "steps": capture.steps if capture else 0,
            "stride": capture.stride if capture else 0,
            "stride_factor": capture.governor.factor if capture else 1,
            "overhead": capture.governor.overhead if capture else 0.0,
            "hook_ns": dict(capture.governor.hook_ns) if capture else {},
            "ledger": msgspec.to_builtins(ledger),
            "summary_bytes": self.search.summary_bytes if capture else 0,
        }

    def _take_logit_weights(self) -> None:
        """Learned sinks and the scales of 8-bit caches come with the weights: read them again when the engine may have
        replaced these."""
        self.search.set_logit_weights(
            [layer_facts.logit_scale(layer) for layer in self._layers],
            [layer_facts.learned_sinks(layer) for layer in self._layers],
        )

    def _publisher_alive(self) -> None:
        """Start the publisher again if it died (called on the estimator thread, once a job)."""
        if self._publisher is not None:
            self._publisher.poll()

    def _free_cpus(self) -> set[int]:
        """CPUs the engine's parent may use and the engine's workers do not; empty if there is none."""
        try:
            allowed = os.sched_getaffinity(os.getppid())
        except OSError:
            allowed = set()
        return allowed - compat.compute_cpus()

    def _request_table(self) -> RequestTable:
        settings, config = self._settings, self._worker.vllm_config
        flags, roles, channels, marks = None, None, None, None
        if parallel.sends_tokens() and (tokenizer := compat.load_tokenizer(config)) is not None:
            flags = token_flags(tokenizer, config.model_config.get_vocab_size())
            roles = PromptRoles.from_tokenizer(tokenizer)
            channels = Channels.from_tokenizer(tokenizer)
            marks = Marks.from_tokenizer(tokenizer)
        return RequestTable(
            settings.stride,
            settings.max_requests,
            settings.client_may_disable,
            flags,
            roles,
            settings.send_token_ids,
            channels,
            marks,
            settings.tenant_argument,
            settings.prompt_stride,
        )

    def _engine_info(self) -> EngineInfo:
        settings, config = self._settings, self._worker.vllm_config
        sizes, here = config.parallel_config, parallel.ranks()
        watched = self.capture_plan.watched
        heads = watched[0].facts.query_heads if watched else 0
        return EngineInfo(
            instance=self._instance,
            model_name=compat.served_model_name(config),
            engine=str(sizes.data_parallel_index),
            data_parallel_index=sizes.data_parallel_index,
            tensor_parallel_rank=here.tensor,
            tensor_parallel_size=sizes.tensor_parallel_size,
            pipeline_parallel_rank=here.pipeline,
            pipeline_parallel_size=sizes.pipeline_parallel_size,
            layers=[planned.facts.index for planned in watched],
            first_query_head=here.tensor * heads,
            total_query_heads=sizes.tensor_parallel_size * heads,
            query_heads=list(self._query_heads),
            geometry=Geometry(
                settings.block_size,
                settings.top_k,
                settings.sink_blocks,
                settings.recent_blocks,
                self._search_config.strategy,
            ),
            vllm_version=compat.vllm_version(),
            plugin_version=__version__,
            summary_bytes=self.search.summary_bytes,
            kv_tokens_lost=self._kv_tokens_lost,
            tenant=settings.tenant,
            tenants_by_request=bool(settings.tenant_argument),
        )
