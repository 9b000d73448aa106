"""What an engine at given capture settings would have sent of a text, without the engine; kept on disk.

A forward pass of transformers over the whole text gives the queries and keys that decoding it token by token would have
given, up to rounding. Layers, heads, stride, search and messages are the product's own.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.attention import CACHE
from benchmarks.paging import paged
from stream_kernels.cpu import CpuSearch
from stream_kernels.search import BlockSummary
from stream_monitor.config import CaptureSettings
from stream_monitor.engine.marks import Marks, Reading
from stream_monitor.engine.packing import pack_rows
from stream_monitor.engine.plan import LayerFacts, make_plan
from stream_monitor.engine.requests import RowLabel
from stream_monitor.engine.search_settings import search_config
from stream_monitor.engine.vocabulary import PromptRoles, overlay_untrusted, token_flags
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

INSTANCE = "00000000-0000-0000-0000-000000000000"
REQUEST = "replay"
_MOST_ROWS = 64
"""Rows searched in one call."""
_FORMAT, _CONTINUATION_FORMAT = 2, 1
"""Of a recording, and of a continuation; another one does not read those on disk."""

Recording = list[bytes]
"""Serialised `PublishRequest`s of one request, in order."""


class Recorder:
    """Records texts of one model.

    The pass over a text goes on from the one before as far as both begin alike, so texts with a common beginning are
    cheapest one after another.

    Args:
        model: loaded by the tracer; layers with a sliding window are not watched, as in the engine.
        settings: of the capture.
    """

    def __init__(self, model: TracedModel, settings: CaptureSettings | None = None) -> None:
        self.model = model
        self.settings = settings or CaptureSettings()
        # A model may have more ids than its tokenizer, and sample them.
        ids = max(len(model.tokenizer), model.decoder.get_input_embeddings().num_embeddings)
        self._flags = token_flags(model.tokenizer, ids)
        self._marks = Marks.from_tokenizer(model.tokenizer)
        self._roles = PromptRoles.from_tokenizer(model.tokenizer)
        facts = [
            LayerFacts(str(layer), layer, "Attention", "-", model.query_heads, 1, 0, 0.0, True, sliding_window=window)
            for layer, window in enumerate(model.windows)
        ]
        watched = make_plan(facts, (), self.settings).watched
        self.layers = [layer.facts.index for layer in watched]
        self.heads = list(watched[0].query_heads)
        self._pass = _Pass(model, self.layers)
        self._sequence = 0

    def flags_of(self, ids: Sequence[int]) -> bytes:
        """One byte of boundary flags a token, as the engine sends them of a text that begins here."""
        return self._marks.revise(Reading(), ids, self._flags[np.asarray(ids, np.int64)].tobytes())

    def record(self, ids: Sequence[int], prompt_tokens: int, untrusted: Sequence[int] = ()) -> Recording:
        """A request with this prompt and this output, from its start to its end.

        Args:
            ids: prompt and output, as many as the model takes.
            prompt_tokens: how many of them are the prompt, at least 1.
            untrusted: [start, end, start, end, ...] of stretches of the prompt that are labelled so.
        """
        identity = [_FORMAT, self.model.name, self._engine().__repr__(), search_config(self.settings).__repr__()]
        text = json.dumps([*identity, self.settings.stride, list(map(int, ids)), prompt_tokens, list(untrusted)])
        path = CACHE / f"recording-{hashlib.sha256(text.encode()).hexdigest()[:24]}.bin"
        if path.exists():
            return _parts(path.read_bytes())
        found = list(self._record(list(map(int, ids)), prompt_tokens, list(untrusted)))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(b"".join(len(message).to_bytes(4, "little") + message for message in found))
        part.replace(path)
        return found

    def continuation(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` tokens with which the model goes on greedily; the end of a text does not stop it."""
        text = json.dumps([_CONTINUATION_FORMAT, "continuation", self.model.name, list(map(int, ids)), count])
        path = CACHE / f"continuation-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        if path.exists():
            return list(json.loads(path.read_text(encoding="utf-8")))
        found = self._pass.go_on(list(map(int, ids)), count)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
        return found

    def _record(self, ids: list[int], prompt_tokens: int, untrusted: list[int]) -> Recording:
        positions = [
            p for p in range(prompt_tokens - 1, len(ids) - 1) if (p + 1 - prompt_tokens) % self.settings.stride == 0
        ]
        queries, keys, scale = self._pass.over(ids, positions)
        flags = self.flags_of(ids)
        starts, roles = self._roles.spans(ids[:prompt_tokens])
        if untrusted:
            starts, roles = overlay_untrusted(starts, roles, untrusted, prompt_tokens)
        started = RequestStarted(
            REQUEST, prompt_tokens, starts.astype("<u4").tobytes(), roles.tobytes(), flags[:prompt_tokens]
        )
        self._sequence = 0
        messages = [self._message(StepRecord(step=0, wall_time_ns=0, ledger=Ledger(), started=[started]))]
        for number, first in enumerate(range(0, len(positions), _MOST_ROWS), 1):
            some = positions[first : first + _MOST_ROWS]
            summary = self._search(queries[:, first : first + len(some)].contiguous(), keys, scale, some)
            labels = [RowLabel(REQUEST, position, 0, Phase.DECODE, "", True) for position in some]
            begin = positions[first - 1] + 2 if first else prompt_tokens
            end = some[-1] + 2
            record = StepRecord(
                step=number,
                wall_time_ns=0,
                ledger=Ledger(),
                tokens=[TokenRun(REQUEST, begin, flags[begin:end])],
                rows=pack_rows(summary, labels, list(range(len(some)))),
            )
            messages.append(self._message(record))
        rest = positions[-1] + 2
        last = StepRecord(step=0, wall_time_ns=0, ledger=Ledger(), finished=[RequestFinished(REQUEST, len(ids))])
        if rest < len(ids):
            last.tokens = [TokenRun(REQUEST, rest, flags[rest:])]
        return [*messages, self._message(last)]

    def _search(
        self, queries: torch.Tensor, keys: list[torch.Tensor], scale: float, positions: list[int]
    ) -> BlockSummary:
        config = search_config(self.settings)
        count, total_heads, tokens = len(positions), queries.shape[2], keys[0].shape[1]
        caches = [paged(layer, scale) for layer in keys]
        out = BlockSummary.allocate(len(keys), count, len(self.heads), config)
        searcher = CpuSearch(
            caches,
            total_heads,
            config,
            max_rows=count,
            max_context=tokens,
            query_dtype=torch.bfloat16,
            query_heads=self.heads,
        )
        pages = np.tile(np.arange(caches[0].num_pages, dtype=np.int32), (count, 1))
        searcher.run(queries, [pages], np.array(positions, np.int32) + 1, out)
        return out

    def _message(self, record: StepRecord) -> bytes:
        self._sequence += 1
        summary = summary_message(engine_message(self._engine()), self._sequence, record, Ledger())
        return ingest_pb2.PublishRequest(summary=summary).SerializeToString()

    def _engine(self) -> EngineInfo:
        config = search_config(self.settings)
        return EngineInfo(
            instance=INSTANCE,
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


class _Pass:
    """Forward passes that go on from the one before where they can."""

    def __init__(self, model: TracedModel, layers: list[int]) -> None:
        self._model = model
        self._layers = layers
        self._ids: list[int] = []
        self._cache: Any = None
        self._queries: dict[int, torch.Tensor] = {}
        self._last = torch.zeros(0)

    def go_on(self, ids: list[int], count: int) -> list[int]:
        """The tokens most likely behind `ids`, one after another."""
        self.over(ids, [0])
        hidden, found = self._last, list[int]()
        while len(found) < count:
            found.append(int(self._model.logits(hidden)[0].argmax()))
            if len(found) < count:
                hidden = self._model.run(found[-1:], dense_attention, self._cache)
        self._cache.crop(len(ids))
        return found

    def over(self, ids: list[int], positions: list[int]) -> tuple[torch.Tensor, list[torch.Tensor], float]:
        """What the watched layers were given.

        Returns:
            Queries, bfloat16 [L, R, H, D], of the rows at `positions` [R]; keys, bfloat16 [G, T, D] of each layer; the
            scale of the logits.
        """
        from transformers import DynamicCache

        pairs = zip(ids[:-1], self._ids, strict=False)
        same = next((place for place, (new, old) in enumerate(pairs) if new != old), min(len(ids) - 1, len(self._ids)))
        if same:
            self._cache.crop(same)
        else:
            self._cache = DynamicCache()
        keys: dict[int, torch.Tensor] = {}
        scales = set()

        def attend(inputs: LayerInputs) -> torch.Tensor:
            if inputs.layer in self._layers:
                before = self._queries[inputs.layer][:same] if same else inputs.queries[:0]
                self._queries[inputs.layer] = torch.cat([before, inputs.queries])
                keys[inputs.layer] = inputs.keys.transpose(0, 1).bfloat16()
                scales.add(inputs.scale)
            return dense_attention(inputs)

        self._last = self._model.run(ids[same:], attend, self._cache)[-1:]
        self._ids = ids
        at = torch.tensor(positions)
        queries = torch.stack([self._queries[layer][at].bfloat16() for layer in self._layers])
        (scale,) = scales
        return queries, [keys[layer] for layer in self._layers], scale


def _parts(raw: bytes) -> Recording:
    found, place = [], 0
    while place < len(raw):
        size = int.from_bytes(raw[place : place + 4], "little")
        found.append(raw[place + 4 : place + 4 + size])
        place += 4 + size
    return found
