"""How the engine lays keys out in its paged cache, and the one description of it that every implementation takes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_DIGIT = 128
"""Base of the probe's digits: bfloat16, the narrowest cache type, holds whole numbers to 256 exactly."""


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
        tensor: the layer's cache [num_pages, kv_heads, page_size, 2 * head_dim], bfloat16, float16 or float32. In
            memory each (page, KV head) tile is its page_size * head_dim key elements, ordered by `layout`, and then as
            many value elements. Pages and heads may be strided; a tile is contiguous.
        layout: the order of a tile's keys.
        scale: factor from dot product to logit.
        table: which of the block tables handed to the search maps this layer's pages (one per KV-cache group).

    Raises:
        ValueError: the tensor does not have that shape, type or strides.
    """

    tensor: torch.Tensor
    layout: KeyLayout
    scale: float
    table: int = 0

    def __post_init__(self) -> None:
        page, dim = self.layout.page_size, self.layout.head_dim
        if self.tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"KV cache is {self.tensor.dtype}; valid: bfloat16, float16, float32")
        if self.tensor.ndim != 4 or self.tensor.shape[2:] != (page, 2 * dim):
            shape = list(self.tensor.shape)
            raise ValueError(f"KV cache is {shape}; expected [pages, kv_heads, {page}, {2 * dim}] for {self.layout}")
        if self.tensor.stride()[2:] != (2 * dim, 1):
            raise ValueError(f"a tile of the KV cache must be contiguous; its strides are {self.tensor.stride()}")
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; it must be positive")

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


def probe_permutation(
    write: Callable[[torch.Tensor], torch.Tensor],
    page_size: int,
    head_dim: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> NDArray[np.int64]:
    """Reads off where an engine's own cache writer puts each key element.

    `write` stores one page of keys [page_size, kv_heads, head_dim] (of `dtype`) in a scratch page and returns the last
    KV head's key tile, [page_size * head_dim] elements in stored order. It is called once per digit of the elements'
    indices in base 128, which every cache type holds exactly: twice, or three times above 16,384 elements.

    Returns:
        Offset of every element in the tile, int64 [page_size, head_dim], for `KeyLayout.from_permutation`.

    Raises:
        ValueError: what came back is not a permutation of what was written.
    """
    size = page_size * head_dim
    digits = 2 if size <= _DIGIT**2 else 3
    index = torch.arange(size).view(page_size, 1, head_dim)
    read = torch.zeros(size, dtype=torch.int64)
    for digit in range(digits):
        keys = (index // _DIGIT**digit % _DIGIT).to(dtype).expand(page_size, kv_heads, head_dim).contiguous()
        read += write(keys).flatten().to(torch.float32).long() * _DIGIT**digit
    permutation = np.full(size, -1, np.int64)
    valid = (read >= 0) & (read < size)
    permutation[read[valid].numpy()] = np.flatnonzero(valid.numpy())
    if (permutation < 0).any():
        raise ValueError("the engine's cache writer did not store a page of keys as a permutation of its elements")
    return permutation.reshape(page_size, head_dim)
