"""A text through the monitor as if it had been served: same layers, heads, stride, search, messages and detectors.

What is left out is the engine: a forward pass of transformers over the whole text gives the queries and keys that
decoding it token by token would have given, up to rounding.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.paging import paged
from stream_kernels.cpu import CpuSearch
from stream_kernels.search import BlockSummary
from stream_monitor.config import CaptureSettings, MonitorSettings
from stream_monitor.engine.packing import pack_rows
from stream_monitor.engine.plan import LayerFacts, make_plan
from stream_monitor.engine.requests import RowLabel
from stream_monitor.engine.search_settings import search_config
from stream_monitor.engine.vocabulary import PromptRoles, token_flags
from stream_monitor.monitor.calibration import Calibration
from stream_monitor.monitor.events import EventLog
from stream_monitor.monitor.ingest import Ingest
from stream_monitor.monitor.merge import Merger
from stream_monitor.monitor.metrics import Metrics
from stream_monitor.monitor.pipeline import Pipeline
from stream_monitor.monitor.ranks import RankBook
from stream_monitor.monitor.store import TraceStore
from stream_monitor.monitor.trace import RequestTrace
from stream_monitor.publisher.convert import engine_message, summary_message
from stream_monitor.records import (
    EngineInfo,
    Geometry,
    Ledger,
    Phase,
    RequestFinished,
    RequestStarted,
    StepRecord,
    TokenRun,
)
from stream_monitor.tracing.attention import LayerInputs, dense_attention
from stream_monitor.tracing.model import TracedModel
from stream_monitor.v1alpha1 import ingest_pb2

_INSTANCE = "00000000-0000-0000-0000-000000000000"
_MOST_ROWS = 64
"""Rows searched in one call."""


@dataclass(frozen=True)
class _Rows:
    """What the watched layers were given.

    Attributes:
        queries: bfloat16 [L, R, H, D]. keys: bfloat16 [G, T, D] of each layer. scale: of the logits.
    """

    queries: torch.Tensor
    keys: list[torch.Tensor]
    scale: float


class Replay:
    """A monitor without a network, and a model that texts are run through.

    Args:
        model: loaded by the tracer; layers with a sliding window are not watched, as in the engine.
        settings: of the capture.
    """

    def __init__(self, model: TracedModel, settings: CaptureSettings | None = None) -> None:
        self.model = model
        self.settings = settings or CaptureSettings()
        self._flags = token_flags(model.tokenizer, len(model.tokenizer))
        self._roles = PromptRoles.from_tokenizer(model.tokenizer)
        facts = [
            LayerFacts(str(layer), layer, "Attention", "-", model.query_heads, 1, 0, 0.0, True, sliding_window=window)
            for layer, window in enumerate(model.windows)
        ]
        watched = make_plan(facts, (), self.settings).watched
        self.layers = [layer.facts.index for layer in watched]
        self.heads = list(watched[0].query_heads)
        self._names = (f"replay-{number}" for number in itertools.count())
        monitor = MonitorSettings()
        ranks, calibration = RankBook(monitor.max_engines), Calibration()
        self._store = TraceStore(monitor.max_traces, monitor.max_trace_bytes, monitor.max_sentences)
        log = EventLog(monitor.event_log, monitor.subscriber_queue, monitor.max_subscribers)
        metrics = Metrics("replay", ranks, self._store, log, calibration)
        pipeline = Pipeline(self._store, log, metrics, calibration)
        self._ingest = Ingest(ranks, Merger(monitor.merge_deadline_seconds), pipeline, metrics, 1 << 30)
        self._sequence = self._step = 0
        self._last: dict[Any, int] = {}
        self._opened: set[Any] = set()

    def run(self, ids: list[int], prompt_tokens: int) -> RequestTrace:
        """The trace of a request with this prompt and this output, finished.

        Args:
            ids: prompt and output, as many as the model takes.
            prompt_tokens: how many of them are the prompt, at least 1.
        """
        positions = [p for p in range(prompt_tokens - 1, len(ids) - 1) if p % self.settings.stride == 0]
        rows = self._rows(ids, positions)
        name = next(self._names)
        flags = self._flags[np.asarray(ids)].tobytes()
        starts, roles = self._roles.spans(ids[:prompt_tokens])
        started = RequestStarted(
            name, prompt_tokens, starts.astype("<u4").tobytes(), roles.tobytes(), flags[:prompt_tokens]
        )
        self._take(StepRecord(step=0, wall_time_ns=0, ledger=Ledger(), started=[started]))
        for first in range(0, len(positions), _MOST_ROWS):
            some = positions[first : first + _MOST_ROWS]
            summary = self._search(rows, first, some)
            labels = [RowLabel(name, position, 0, Phase.DECODE, "", True) for position in some]
            end = some[-1] + 2
            begin = positions[first - 1] + 2 if first else prompt_tokens
            self._step += 1
            self._take(
                StepRecord(
                    step=self._step,
                    wall_time_ns=0,
                    ledger=Ledger(),
                    tokens=[TokenRun(name, begin, flags[begin:end])],
                    rows=pack_rows(summary, labels, list(range(len(some)))),
                )
            )
        self._take(StepRecord(step=0, wall_time_ns=0, ledger=Ledger(), finished=[RequestFinished(name, len(ids))]))
        trace = self._store.get(_INSTANCE, name)
        assert trace is not None, name
        return trace

    def _rows(self, ids: list[int], positions: list[int]) -> _Rows:
        """A forward pass that keeps what the watched layers were given."""
        at = torch.tensor(positions)
        queries, keys, scales = [], [], set()

        def attend(inputs: LayerInputs) -> torch.Tensor:
            if inputs.layer in self.layers:
                queries.append(inputs.queries[at].bfloat16())
                keys.append(inputs.keys.transpose(0, 1).bfloat16())
                scales.add(inputs.scale)
            return dense_attention(inputs)

        self.model.run(ids, attend)
        (scale,) = scales
        return _Rows(torch.stack(queries), keys, scale)

    def _search(self, rows: _Rows, first: int, positions: list[int]) -> BlockSummary:
        config = search_config(self.settings)
        count, total_heads, tokens = len(positions), rows.queries.shape[2], rows.keys[0].shape[1]
        keys = [paged(layer, rows.scale) for layer in rows.keys]
        out = BlockSummary.allocate(len(keys), count, len(self.heads), config)
        searcher = CpuSearch(
            keys,
            total_heads,
            config,
            max_rows=count,
            max_context=tokens,
            query_dtype=torch.bfloat16,
            query_heads=self.heads,
        )
        pages = np.tile(np.arange(keys[0].num_pages, dtype=np.int32), (count, 1))
        queries = rows.queries[:, first : first + count].contiguous()
        searcher.run(queries, [pages], np.array(positions, np.int32) + 1, out)
        return out

    def _take(self, record: StepRecord) -> None:
        self._sequence += 1
        message = summary_message(engine_message(self._engine()), self._sequence, record, Ledger())
        raw = ingest_pb2.PublishRequest(summary=message).SerializeToString()
        answer = self._ingest.take(raw, self._last, self._opened)
        assert answer.outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED, answer

    def _engine(self) -> EngineInfo:
        config = search_config(self.settings)
        return EngineInfo(
            instance=_INSTANCE,
            model_name=self.model.name,
            engine="0",
            data_parallel_index=0,
            tensor_parallel_rank=0,
            tensor_parallel_size=1,
            pipeline_parallel_rank=0,
            pipeline_parallel_size=1,
            layers=self.layers,
            first_query_head=0,
            total_query_heads=self.model.query_heads,
            query_heads=self.heads,
            geometry=Geometry(
                config.block_size, config.top_k, config.sink_blocks, config.recent_blocks, config.strategy
            ),
            vllm_version="",
            plugin_version="",
        )
