"""One pass over a context that leaves the masks of every layer on disk."""

import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from stream_kernels.prefill import PrefillSummary
from stream_monitor.tracing.attention import LayerInputs
from stream_monitor.tracing.folder import whole_folder
from stream_monitor.tracing.layer import TraceOptions, attend, search_layer
from stream_monitor.tracing.masks import MASKS, LayerMasks, MaskWriter
from stream_monitor.tracing.model import TracedModel
from stream_monitor.tracing.pruning import PairCount, count_pairs

SUMMARY = "trace.json"


@dataclass(frozen=True)
class Progress:
    """Where a pass stands.

    Attributes:
        layer: layers done; layers: of all.
        tokens: of the context.
        seconds: since the pass began.
        peak_bytes: largest memory of the process so far.
    """

    layer: int
    layers: int
    tokens: int
    seconds: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through all layers, or would have at this pace."""
        return self.tokens * self.layer / (self.layers * self.seconds)


@dataclass(frozen=True)
class Trace:
    """What a pass did; the masks are in `out`.

    Attributes:
        out: the folder: `masks.parquet` (see `masks.py`) and `trace.json`, these figures.
        tokens: of the context.
        pairs: of blocks, over all layers and heads.
        windows: layer to the keys it sees, for layers with a sliding window; their masks lie inside it.
        next_token: the likeliest after the context, by the pass as it was run.
        seconds: of the pass.
        peak_bytes: largest memory of the process so far.
    """

    out: Path
    tokens: int
    pairs: PairCount
    windows: dict[int, int]
    next_token: str
    seconds: float
    peak_bytes: int

    def summary(self) -> dict[str, Any]:
        """JSON values for `trace.json`."""
        return {
            "tokens": self.tokens,
            "pruned_of_causal": self.pairs.pruned_of_causal,
            "pruned_of_square": self.pairs.pruned_of_square,
            "windows": {str(layer): window for layer, window in self.windows.items()},
            "next_token": self.next_token,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }


class Companion(Protocol):
    """What writes more than masks, in the same pass and into the same folder, whole or not at all."""

    def begin(self, folder: Path) -> None:
        """Before the pass."""

    def read(self, inputs: LayerInputs, found: PrefillSummary) -> None:
        """After each layer's search."""

    def finish(self, folder: Path, masks: Path, summary: dict[str, Any]) -> None:
        """Once the file of masks is complete; `summary` is what `trace.json` says."""


def trace(
    model: TracedModel,
    ids: list[int],
    options: TraceOptions,
    out: Path,
    progress: Callable[[Progress], None] = lambda _: None,
    companion: Companion | None = None,
) -> Trace:
    """Traces tokens `ids` and writes the folder `out`, whole or, on any error or interrupt, not at all.

    Args:
        model: loaded.
        ids: the context, at least one token.
        options: how.
        out: a new folder, or an empty one.
        progress: called after every layer.
        companion: writes more into `out`.

    Raises:
        TracingError: `out` is taken or cannot be written.
    """
    began = time.monotonic()
    pairs = PairCount()
    with whole_folder(out) as part:
        writer = MaskWriter(part / MASKS)
        if companion is not None:
            companion.begin(part)

        def attend_and_keep(inputs: LayerInputs) -> torch.Tensor:
            nonlocal pairs
            found = search_layer(inputs, options)
            writer.write(LayerMasks.of(found))
            if companion is not None:
                companion.read(inputs, found)
            pairs += count_pairs(found, options.search.block_size, inputs.window)
            output = attend(inputs, found, options)
            seconds = time.monotonic() - began
            progress(Progress(inputs.layer + 1, model.layers, len(ids), seconds, peak_bytes()))
            return output

        hidden = model.run(ids, attend_and_keep)
        writer.close(_metadata(model, ids, options))
        result = Trace(
            out=out,
            tokens=len(ids),
            pairs=pairs,
            windows={layer: window for layer, window in enumerate(model.windows) if window},
            next_token=model.tokenizer.decode([int(model.logits(hidden[-1:]).argmax())]),
            seconds=time.monotonic() - began,
            peak_bytes=peak_bytes(),
        )
        (part / SUMMARY).write_text(json.dumps(result.summary(), indent=2) + "\n", encoding="utf-8")
        if companion is not None:
            companion.finish(part, part / MASKS, result.summary())
    return result


def _metadata(model: TracedModel, ids: list[int], options: TraceOptions) -> dict[str, Any]:
    """What a reader of the masks must know, JSON values only."""
    return {
        "model": model.name,
        "layers": model.layers,
        "query_heads": model.query_heads,
        "windows": list(model.windows),
        "attention": options.attention,
        "reduction": options.reduction,
        "search": asdict(options.search),
        "versions": {name: version(name) for name in ("stream-monitor", "torch", "transformers")},
        "tokens": ids,
    }


def peak_bytes() -> int:
    """Largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
