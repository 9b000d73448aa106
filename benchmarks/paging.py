"""Keys in a cache of pages, in the order in which vLLM's CPU cache has them."""

import torch

from stream_kernels.layout import KeyLayout, PagedKeys

PAGE_SIZE = 128


def layout(head_dim: int) -> KeyLayout:
    """Channels outermost, tokens of a page in a row."""
    return KeyLayout(page_size=PAGE_SIZE, head_dim=head_dim, token_group=PAGE_SIZE, channel_pack=1)


def allocate(tokens: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """A bfloat16 cache of one layer, keys and values, all 0."""
    return torch.zeros(-(-tokens // PAGE_SIZE), kv_heads, PAGE_SIZE, 2 * head_dim, dtype=torch.bfloat16)


def store(cache: torch.Tensor, first_page: int, keys: torch.Tensor) -> None:
    """Writes keys [G, T, D] to the pages from `first_page` on."""
    _, tokens, dim = keys.shape
    pages = -(-tokens // PAGE_SIZE)
    padded = torch.nn.functional.pad(keys, (0, 0, 0, pages * PAGE_SIZE - tokens))
    stored = layout(dim).from_logical(padded.unflatten(1, (pages, PAGE_SIZE)).transpose(0, 1))
    cache[first_page : first_page + pages].flatten(-2)[..., : PAGE_SIZE * dim] = stored


def paged(keys: torch.Tensor, scale: float) -> PagedKeys:
    """One layer's keys [G, T, D], pages in order."""
    kv_heads, tokens, dim = keys.shape
    cache = allocate(tokens, kv_heads, dim)
    store(cache, 0, keys)
    return PagedKeys(cache, layout(dim), scale)
