"""How the engine lays keys out in its paged cache, and the one description of it that every implementation takes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

_DIGIT = 128
"""Base of the probe's digits: bfloat16 holds whole numbers to 256 exactly."""
_DIGIT_OF_8_BITS = 8
"""The same in a cache of 8-bit floats: E5M2 holds whole numbers to 8 exactly."""

KEY_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
"""Element types of the caches that a search reads."""


@dataclass(frozen=True)
class KeyLayout:
    """Order of the page_size * head_dim key elements of one (page, KV head) tile.

    Tokens are stored in groups of `token_group` (T); inside a group come head_dim / `channel_pack` (P) packs of
    channels, inside a pack the group's tokens, and inside a token the pack's channels:

        offset(t, c) = (t // T) * T * head_dim + (c // P) * T * P + (t % T) * P + c % P

    vLLM's CPU caches are of this form: `vec` has T = page_size, P = 1; `amx` has T = 16, P = 2. Row-major is T = P = 1.

    Raises:
        ValueError: a size is not positive, T does not divide page_size, or P does not divide head_dim.
    """

    page_size: int
    head_dim: int
    token_group: int
    channel_pack: int

    def __post_init__(self) -> None:
        if min(self.page_size, self.head_dim, self.token_group, self.channel_pack) < 1:
            raise ValueError(f"every size of a key layout is at least 1: {self}")
        if self.page_size % self.token_group:
            raise ValueError(f"token_group {self.token_group} does not divide page_size {self.page_size}")
        if self.head_dim % self.channel_pack:
            raise ValueError(f"channel_pack {self.channel_pack} does not divide head_dim {self.head_dim}")

    @classmethod
    def row_major(cls, page_size: int, head_dim: int) -> "KeyLayout":
        """One token after the other, channels contiguous."""
        return cls(page_size, head_dim, token_group=1, channel_pack=1)

    @classmethod
    def from_permutation(cls, permutation: NDArray[np.int64]) -> "KeyLayout":
        """The layout whose offsets are `permutation`, an integer array [page_size, head_dim].

        Where several (T, P) say the same thing the smallest is returned.

        Raises:
            ValueError: no (T, P) explains every entry.
        """
        page_size, head_dim = permutation.shape
        for token_group in (t for t in range(1, page_size + 1) if page_size % t == 0):
            for channel_pack in (p for p in range(1, head_dim + 1) if head_dim % p == 0):
                layout = cls(page_size, head_dim, token_group, channel_pack)
                if np.array_equal(layout.offsets(), permutation):
                    return layout
        raise ValueError(
            f"the engine's key layout is not known: no token group and channel pack explain all {permutation.size} "
            f"offsets of a page of {page_size} tokens and {head_dim} channels"
        )

    def offsets(self) -> NDArray[np.int64]:
        """Where element (token, channel) lies in its tile, int64 [page_size, head_dim]."""
        t, c = np.ogrid[: self.page_size, : self.head_dim]
        group, pack = self.token_group, self.channel_pack
        offsets = (t // group) * group * self.head_dim + (c // pack) * group * pack + (t % group) * pack + c % pack
        return np.asarray(offsets, np.int64)

    def to_logical(self, tile: torch.Tensor) -> torch.Tensor:
        """Stored order [..., page_size * head_dim] to keys [..., page_size, head_dim], a copy."""
        return tile[..., torch.from_numpy(self.offsets())]

    def from_logical(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [..., page_size, head_dim] to stored order [..., page_size * head_dim], a copy."""
        stored = torch.empty_like(keys).flatten(-2)
        stored[..., torch.from_numpy(self.offsets()).flatten()] = keys.flatten(-2)
        return stored


@dataclass(frozen=True)
class PagedKeys:
    """One layer's keys, where the engine keeps them.

    Attributes:
        tensor: the layer's cache [num_pages, kv_heads, page_size, 2 * head_dim], of one of KEY_TYPES. In memory each
            (page, KV head) tile is its page_size * head_dim key elements, ordered by `layout`, and then as many value
            elements. Pages and heads may be strided; a tile is contiguous.
        layout: the order of a tile's keys.
        scale: factor from dot product to logit; of an 8-bit cache it includes the scale its keys were stored with.
        table: which of the block tables handed to the search maps this layer's pages (one per KV-cache group).
        softcap: bound of the logits, as in Gemma 2: after the scale a logit x becomes softcap * tanh(x / softcap).
            0 for none.
        sinks: learned attention sinks, as in gpt-oss: float32 [H_total], for each query head a logit that takes its
            share of the softmax without belonging to any key; neither scaled nor capped. None for none.

    Raises:
        ValueError: a tensor does not have that shape, type or strides, or a number is out of its range.
    """

    tensor: torch.Tensor
    layout: KeyLayout
    scale: float
    table: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        page, dim = self.layout.page_size, self.layout.head_dim
        _check_type(self.tensor)
        if self.tensor.ndim != 4 or self.tensor.shape[2:] != (page, 2 * dim):
            shape = list(self.tensor.shape)
            raise ValueError(f"KV cache is {shape}; expected [pages, kv_heads, {page}, {2 * dim}] for {self.layout}")
        if self.tensor.stride()[2:] != (2 * dim, 1):
            raise ValueError(f"a tile of the KV cache must be contiguous; its strides are {self.tensor.stride()}")
        _check_logits(self.scale, self.softcap, self.sinks, self.kv_heads)

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.tensor.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads on this rank."""
        return self.tensor.shape[1]

    def gather(self, pages: torch.Tensor) -> torch.Tensor:
        """The keys of `pages` (integers [n]) in logical order, float64 [n * page_size, kv_heads, head_dim]."""
        size = self.layout.page_size * self.layout.head_dim
        tiles = self.tensor[pages.long()].flatten(-2)[..., :size]
        return self.layout.to_logical(tiles).transpose(1, 2).flatten(0, 1).double()


@dataclass(frozen=True)
class DeviceKeys:
    """One layer's keys on a GPU, where the engine keeps them.

    Attributes:
        tensor: a view [num_pages, page_size, kv_heads, head_dim] of the engine's cache, of one of KEY_TYPES. Channels
            are contiguous; all else may be strided, so that caches with tokens before heads (NHD) and heads before
            tokens (HND) are the same to the search.
        scale: as in `PagedKeys`.
        table: which of the block tables handed to the search maps this layer's pages (one per KV-cache group).
        softcap: as in `PagedKeys`.
        sinks: as in `PagedKeys`, on any device.

    Raises:
        ValueError: a tensor does not have that shape, type or strides, or a number is out of its range.
    """

    tensor: torch.Tensor
    scale: float
    table: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_type(self.tensor)
        if self.tensor.ndim != 4:
            raise ValueError(
                f"KV cache is {list(self.tensor.shape)}; expected a view [pages, page_size, kv_heads, head_dim]"
            )
        if self.tensor.stride(3) != 1:
            raise ValueError(f"a key's channels must be contiguous; the cache's strides are {self.tensor.stride()}")
        _check_logits(self.scale, self.softcap, self.sinks, self.kv_heads)

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.tensor.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads on this rank."""
        return self.tensor.shape[2]

    @property
    def layout(self) -> KeyLayout:
        """The order of one head's keys of a page, strides left aside: row-major."""
        return KeyLayout.row_major(page_size=self.tensor.shape[1], head_dim=self.tensor.shape[3])

    def gather(self, pages: torch.Tensor) -> torch.Tensor:
        """The keys of `pages` (integers [n]) in logical order, float64 [n * page_size, kv_heads, head_dim]."""
        # As bytes, because torch does not index 8-bit floats.
        stored = self.tensor.view(torch.uint8)[pages.long()]
        return stored.view(self.tensor.dtype).flatten(0, 1).double()


def layer_refusals(keys: Sequence[PagedKeys | DeviceKeys], total_query_heads: int, watched: Sequence[int]) -> list[str]:
    """Every reason why one search cannot take these layers (at least one) and the query heads `watched` together."""
    first, reasons = keys[0], []
    for index, layer in enumerate(keys):
        if (layer.layout, layer.tensor.dtype, layer.kv_heads) != (first.layout, first.tensor.dtype, first.kv_heads):
            reasons.append(f"layer {index} has another layout, type or number of KV heads than layer 0")
        if layer.tensor.device != first.tensor.device:
            reasons.append(f"layer {index} is on {layer.tensor.device}, layer 0 on {first.tensor.device}")
        if layer.sinks is not None and len(layer.sinks) != total_query_heads:
            reasons.append(f"layer {index} has {len(layer.sinks)} learned sinks for {total_query_heads} query heads")
    if total_query_heads % first.kv_heads:
        reasons.append(f"{total_query_heads} query heads do not divide among {first.kv_heads} KV heads")
    if not watched or len(set(watched)) < len(watched) or not set(watched) <= set(range(total_query_heads)):
        reasons.append(f"query_heads {list(watched)} must be distinct and among {total_query_heads}")
    return reasons


Keys = TypeVar("Keys", PagedKeys, DeviceKeys)


def with_logit_weights(
    keys: Sequence[Keys], scales: Sequence[float], sinks: Sequence[torch.Tensor | None]
) -> tuple[Keys, ...]:
    """The same layers with other factors and learned sinks.

    Raises:
        ValueError: not one entry per layer, or one that a layer does not take.
    """
    return tuple(replace(layer, scale=s, sinks=own) for layer, s, own in zip(keys, scales, sinks, strict=True))


def _check_type(cache: torch.Tensor) -> None:
    """Raises ValueError where no search reads elements of that type."""
    if cache.dtype not in KEY_TYPES:
        raise ValueError(f"KV cache is {cache.dtype}; valid: {', '.join(map(str, KEY_TYPES))}")


def _check_logits(scale: float, softcap: float, sinks: torch.Tensor | None, kv_heads: int) -> None:
    """Raises ValueError where a layer's logits cannot be formed from these."""
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it must be positive, or 0 for none")
    if sinks is not None and (sinks.dtype != torch.float32 or sinks.ndim != 1 or len(sinks) % kv_heads):
        raise ValueError(
            f"sinks are {sinks.dtype} {list(sinks.shape)}; expected float32, one for each query head "
            f"of {kv_heads} KV heads"
        )


def probe_permutation(
    write: Callable[[torch.Tensor], torch.Tensor],
    page_size: int,
    head_dim: int,
    kv_heads: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> NDArray[np.int64]:
    """Reads off where an engine's own cache writer puts each key element.

    `write` stores one page of keys [page_size, kv_heads, head_dim] (of `dtype`) in a scratch page (of `cache_dtype`)
    and returns the last KV head's key tile, [page_size * head_dim] elements in stored order. It is called once per
    digit of the elements' indices, in a base whose digits a cache holds exactly: two or three times, with 8 bits five
    or six.

    Returns:
        Offset of every element in the tile, int64 [page_size, head_dim], for `KeyLayout.from_permutation`.

    Raises:
        ValueError: what came back is not a permutation of what was written.
    """
    size = page_size * head_dim
    base = _DIGIT if cache_dtype.itemsize > 1 else _DIGIT_OF_8_BITS
    digits = next(count for count in range(1, 64) if base**count >= size)
    index = torch.arange(size).view(page_size, 1, head_dim)
    read = torch.zeros(size, dtype=torch.int64)
    for digit in range(digits):
        keys = (index // base**digit % base).to(dtype).expand(page_size, kv_heads, head_dim).contiguous()
        read += write(keys).flatten().to(torch.float32).long() * base**digit
    permutation = np.full(size, -1, np.int64)
    valid = (read >= 0) & (read < size)
    permutation[read[valid].numpy()] = np.flatnonzero(valid.numpy())
    if (permutation < 0).any():
        raise ValueError("the engine's cache writer did not store a page of keys as a permutation of its elements")
    return permutation.reshape(page_size, head_dim)
