"""Where the attention layers of a transformers model meet this package, and dense attention for them.

transformers lets a name stand for the function that all attention layers of a model call (`AttentionInterface`). Ours
looks at what a layer was given and hands it to whatever `attending` was told to compute with. transformers builds no
mask for names it does not know, so no T x T array exists; the layers are causal, inside a window where they have one.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from stream_kernels.statistics import capped
from stream_monitor.tracing.errors import TracingError

IMPLEMENTATION = "stream_monitor_trace"
"""Our name among transformers' attention implementations."""

_TILE_LOGITS = 2**23
"""Logits held at a time by tiled dense attention: 32 MiB of float32."""

_TILE_ROWS = 256
"""Most rows of such a tile: in longer ones most keys are later than most rows."""


@dataclass(frozen=True)
class LayerInputs:
    """What one attention layer is given, for Q query tokens that end a context of T tokens.

    Attributes:
        layer: number of the decoder layer.
        queries: [Q, H, D], after position encoding, unscaled.
        keys: [T, G, D], after position encoding. Query head h reads KV head h // (H // G).
        values: [T, G, Dv].
        scale: factor from dot product to logit.
        softcap: bound of the logits as in Gemma 2, 0 for none.
        window: keys a token sees, itself included; 0 if it sees all before it.
    """

    layer: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float
    softcap: float
    window: int

    @property
    def first_query(self) -> int:
        """Position of the first query."""
        return len(self.keys) - len(self.queries)


Attend = Callable[[LayerInputs], torch.Tensor]
"""Gives a layer's output, [Q, H, Dv], of its inputs."""

_attend: ContextVar[Attend] = ContextVar("attend")


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Every layer of a model loaded with `IMPLEMENTATION` computes with `attend`."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def register() -> None:
    """Makes `IMPLEMENTATION` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _forward)


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Of one prompt: query [1, H, Q, D], key and value [1, G, T, D], as transformers calls it.

    Raises:
        TracingError: the layer is not causal softmax attention over its keys alone.
    """
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise TracingError(f"{type(module).__name__} does not say which layer it is")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal:
        raise TracingError(f"not a decoder: layer {layer} sees later tokens too")
    if attention_mask is not None:
        raise TracingError(f"layer {layer} brings an attention mask of its own")
    if s_aux is not None:
        raise TracingError(f"layer {layer} has learned attention sinks, which tracing does not know yet")
    inputs = LayerInputs(
        layer=layer,
        queries=query[0].transpose(0, 1).float(),
        keys=key[0].transpose(0, 1).float(),
        values=value[0].transpose(0, 1).float(),
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap=softcap or 0.0,
        window=sliding_window or 0,
    )
    with torch.autocast(query.device.type, enabled=False):
        return _attend.get()(inputs)[None], None


def dense_attention(inputs: LayerInputs, hidden: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """All that the layer may read, in memory linear in T: [Q, H, Dv].

    Rows behind the `hidden` tokens [start, end) do not see these: their logits are -inf, and the softmax is over the
    rest. Rows before `end` see all they may, so that the hidden tokens themselves are computed as ever.
    """
    queries, keys, values = (x.transpose(0, 1) for x in (inputs.queries, inputs.keys, inputs.values))
    whole = hidden[0] == hidden[1] and not inputs.window and not inputs.first_query
    if whole and _torch_can(inputs):
        out = torch.nn.functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, scale=inputs.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    heads, rows, _ = queries.shape
    tile = max(1, min(_TILE_ROWS, _TILE_LOGITS // (heads * keys.shape[1])))
    parts = [_dense_tile(inputs, first, min(rows, first + tile), hidden) for first in range(0, rows, tile)]
    return torch.cat(parts)


def _torch_can(inputs: LayerInputs) -> bool:
    """Whether torch has a kernel for such heads that holds no square of logits."""
    return not inputs.softcap and inputs.keys.shape[-1] == inputs.values.shape[-1]


def _dense_tile(inputs: LayerInputs, first: int, last: int, hidden: tuple[int, int]) -> torch.Tensor:
    """Rows `first` to `last` of `dense_attention`."""
    row = inputs.first_query + torch.arange(first, last, device=inputs.keys.device)
    start = max(0, inputs.first_query + first + 1 - inputs.window) if inputs.window else 0
    end = inputs.first_query + last
    keys, values = inputs.keys[start:end].transpose(0, 1), inputs.values[start:end].transpose(0, 1)
    queries = inputs.queries[first:last].transpose(0, 1)
    key = torch.arange(start, end, device=row.device)
    visible = visible_keys(row, key, inputs.window)
    # A row behind the hidden tokens always keeps itself.
    visible &= (row < hidden[1])[:, None] | (key < hidden[0]) | (key >= hidden[1])
    if _torch_can(inputs):
        out = torch.nn.functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=visible, scale=inputs.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    logits = capped(queries.unflatten(0, (len(keys), -1)) @ keys[:, None].mT * inputs.scale, inputs.softcap)
    shares = logits.masked_fill(~visible, -math.inf).softmax(-1)
    return (shares @ values[:, None]).flatten(0, 1).transpose(0, 1)


def visible_keys(rows: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """Which keys at positions `keys` [..., m] tokens at positions `rows` [..., n] see, bool [..., n, m]."""
    distance = rows[..., :, None] - keys[..., None, :]
    return (distance >= 0) & (distance < window) if window else distance >= 0
