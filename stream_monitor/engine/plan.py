"""What will be captured, decided before anything is installed, with every reason for what will not.

Reasons are collected, never raised one by one; `stream-monitor doctor` prints the same plan that the worker installs.
"""

import ipaddress
from collections import Counter
from dataclasses import dataclass

from stream_monitor.config import CaptureSettings, SettingsError

AUTO_MAX_LAYERS = 4
PLAIN_CACHES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class LayerFacts:
    """What the plan needs to know of one attention layer; filled by compat/layers.py.

    Attributes:
        name: vLLM's layer name, such as `model.layers.3.self_attn.attn`.
        index: decoder layer, from 0 over the whole model.
        kind: class of the layer, such as `Attention` or `MLAAttention`.
        implementation: class of its attention implementation; "-" for a layer without one.
        query_heads, kv_heads: on this rank.
        scale: factor on q.k before the softmax.
        tapped: the implementation is one of ours.
        most_head_dim: the largest that this platform's search is tested with.
        quantised_caches: types of quantised KV cache that this implementation's capture reads.
        varying_scales: the scales of a quantised cache differ from head to head, or are found while serving.
        Others: as vLLM names them; None, 0 or "" mean the layer does without.
    """

    name: str
    index: int
    kind: str
    implementation: str
    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    tapped: bool
    attention_type: str = "decoder"
    kv_cache_dtype: str = "auto"
    sliding_window: int = 0
    alibi: bool = False
    shares_kv_with: str = ""
    draft: bool = False
    most_head_dim: int = 512
    quantised_caches: tuple[str, ...] = ()
    varying_scales: bool = False

    @property
    def shape(self) -> tuple[int, int, int, str]:
        """What all layers of one search have in common."""
        return self.query_heads, self.kv_heads, self.head_dim, self.kv_cache_dtype


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the model, and what the plan does with it.

    Attributes:
        query_heads: heads to watch on this rank, ascending; empty if the layer is not watched.
        refusals: why it cannot be captured; empty for a layer that could be, watched or not.
    """

    facts: LayerFacts
    query_heads: tuple[int, ...]
    refusals: tuple[str, ...]


@dataclass(frozen=True)
class CapturePlan:
    """All layers in model order, and the reasons that rule out capture as a whole."""

    layers: tuple[PlannedLayer, ...]
    refusals: tuple[str, ...]
    pipeline: bool = False

    @property
    def watched(self) -> tuple[PlannedLayer, ...]:
        """The layers that will be captured; none when anything rules capture out."""
        return () if self.refusals else tuple(layer for layer in self.layers if layer.query_heads)

    @property
    def bystander(self) -> bool:
        """Whether this rank watches nothing, and other pipeline ranks may: it then tells of requests alone."""
        return self.pipeline and not self.refusals and not self.watched

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every reason in plain lines: of the whole first, then of the layers, equal ones counted."""
        by_reason: dict[str, list[int]] = {}
        for layer in self.layers:
            for reason in layer.refusals:
                by_reason.setdefault(reason, []).append(layer.facts.index)
        return self.refusals + tuple(f"layers {_ranges(indices)}: {reason}" for reason, indices in by_reason.items())


def make_plan(
    layers: list[LayerFacts], engine_refusals: tuple[str, ...], settings: CaptureSettings, model_layers: int = 0
) -> CapturePlan:
    """Decide which layers and heads to watch.

    Args:
        layers: the attention layers of this rank, any order.
        engine_refusals: reasons that rule out this engine as a whole, from compat/engine.py.
        settings: the operator's choice of layers and heads.
        model_layers: decoder layers of the whole model where this rank has a pipeline's part of them, else 0.

    Raises:
        SettingsError: `layers` or `heads` names something the model does not have or that is not a list.
    """
    ordered = sorted(layers, key=lambda facts: facts.index)
    refusals = {facts.name: layer_refusals(facts) for facts in ordered}
    capable = [facts for facts in ordered if not refusals[facts.name]]
    shapes = Counter(facts.shape for facts in capable)
    if len(shapes) > 1:
        # One estimator call covers all watched layers, so they share one shape: the most common one.
        [(shape, _)] = shapes.most_common(1)
        for facts in capable:
            if facts.shape != shape:
                refusals[facts.name] = ("its head counts, head size or KV cache type differ from most layers'",)
        capable = [facts for facts in capable if not refusals[facts.name]]
    heads = _choose_heads(capable, settings)
    chosen = _choose_layers(model_layers, ordered, capable, len(heads), settings)
    planned = tuple(
        # Two layers may have one index, such as attention and a state-space mixer side by side.
        PlannedLayer(facts, heads if facts.index in chosen and not refusals[facts.name] else (), refusals[facts.name])
        for facts in ordered
    )
    # A pipeline rank without any may still be the one that samples the tokens.
    nothing = () if ordered or model_layers else ("the model has no attention layer on this rank",)
    return CapturePlan(planned, (*engine_refusals, *nothing), pipeline=model_layers > 0)


def target_refusals(hosts: int, target: str) -> tuple[str, ...]:
    """Why an engine whose ranks run on so many hosts cannot publish to `target`: to one host's own monitor."""
    if hosts < 2 or not _of_one_host(target):
        return ()
    return (
        f"the engine's ranks run on {hosts} hosts and target {target} is each host's own: set STREAM_MONITOR_TARGET to "
        "the host:port of one monitor for all of them",
    )


def _of_one_host(target: str) -> bool:
    """Whether an address means another place on every host: a Unix socket, or loopback."""
    if target.startswith("unix:"):
        return True
    host = target.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def layer_refusals(facts: LayerFacts) -> tuple[str, ...]:
    """Every reason why this layer's attention cannot be recomputed exactly from its KV cache."""
    checks: list[tuple[bool, str]] = [
        (facts.kind == "MLAAttention", "latent attention (MLA) keeps no per-head keys"),
        (
            facts.kind not in ("Attention", "MLAAttention"),
            f"{facts.kind} is not softmax attention over a KV cache we know",
        ),
        (facts.attention_type != "decoder", f"{facts.attention_type} attention is not causal decoding"),
        (facts.draft, "belongs to the draft model"),
        (
            facts.kind == "Attention" and not facts.tapped,
            f"its implementation {facts.implementation} has no Stream Monitor subclass on this platform",
        ),
        (facts.sliding_window > 0, f"sliding window of {facts.sliding_window} tokens"),
        (facts.alibi, "ALiBi position biases"),
        (bool(facts.shares_kv_with), f"shares the KV cache of {facts.shares_kv_with}"),
        (
            facts.kv_cache_dtype not in (*PLAIN_CACHES, *facts.quantised_caches),
            f"KV cache of type {facts.kv_cache_dtype}",
        ),
        (
            facts.kv_cache_dtype in facts.quantised_caches and facts.varying_scales,
            f"KV cache of type {facts.kv_cache_dtype} whose scales differ from head to head or are found while serving",
        ),
        (facts.head_dim > facts.most_head_dim, f"head size {facts.head_dim} above {facts.most_head_dim}"),
    ]
    return tuple(reason for applies, reason in checks if applies)


def _choose_heads(capable: list[LayerFacts], settings: CaptureSettings) -> tuple[int, ...]:
    if not capable:
        return ()
    total = capable[0].query_heads
    if settings.heads == "all":
        return tuple(range(total))
    if settings.heads == "auto":
        count = min(total, settings.max_heads)
        return tuple(sorted({i * total // count for i in range(count)}))
    return _parse_indices("heads", settings.heads, range(total))


def _choose_layers(
    model_layers: int, ordered: list[LayerFacts], capable: list[LayerFacts], heads: int, settings: CaptureSettings
) -> frozenset[int]:
    indices = [facts.index for facts in capable]
    if settings.layers == "all":
        return frozenset(indices)
    if settings.layers == "auto":
        if not indices:
            return frozenset()
        # Receiver heads sit in the later layers; the first third mostly reads neighbouring tokens.
        last = model_layers - 1 if model_layers else ordered[-1].index
        upper = [i for i in indices if 3 * i >= last]
        if not upper and not model_layers:
            upper = indices
        if not upper:
            return frozenset()
        count = max(1, min(AUTO_MAX_LAYERS, settings.max_heads // max(heads, 1), len(upper)))
        return frozenset(upper[(2 * n + 1) * len(upper) // (2 * count)] for n in range(count))
    # What other pipeline ranks have is theirs to watch; what no rank has does not exist.
    valid = range(model_layers) if model_layers else [facts.index for facts in ordered]
    named = _parse_indices("layers", settings.layers, valid)
    return frozenset(named) & frozenset(indices)


def _parse_indices(key: str, text: str, valid: range | list[int]) -> tuple[int, ...]:
    """'8,12,20-23' -> (8, 12, 20, 21, 22, 23)."""
    chosen: set[int] = set()
    allowed = set(valid)
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise SettingsError(f"{key}: {text!r} is neither auto, all nor a list such as 8,12,20-23")
        if dash and int(last) < int(first):
            raise SettingsError(f"{key}: {part.strip()} is empty; the smaller number comes first")
        chosen.update(range(int(first), int(last or first) + 1))
    if missing := sorted(chosen - allowed):
        raise SettingsError(f"{key}: {missing[0]} does not exist; valid: {_ranges(sorted(allowed))}")
    return tuple(sorted(chosen))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
