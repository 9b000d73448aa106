"""Random paged caches and queries for the tests of this folder."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from stream_kernels.layout import KeyLayout, PagedKeys
from stream_kernels.search import SearchConfig


@dataclass(frozen=True)
class Case:
    """One shape. `grid` draws small whole numbers, whose dot products are exact in float32 in any order: then every
    decision of the search, ties included, must be the same in each implementation."""

    config: SearchConfig
    contexts: tuple[int, ...]
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    page_size: int = 32
    token_group: int = 0
    """0: the whole page."""
    channel_pack: int = 1
    dtype: torch.dtype = torch.bfloat16
    query_dtype: torch.dtype | None = None
    layers: int = 2
    tables: int = 1
    query_heads: tuple[int, ...] | None = None
    softcap: float = 0.0
    """Of the first layer; each following one has a smaller."""
    sinks: bool = False
    """Learned ones in every second layer; over the heads they take from nothing to nearly all of the attention."""
    grid: bool = True
    seed: int = 0

    @property
    def total_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def layout(self) -> KeyLayout:
        return KeyLayout(self.page_size, self.head_dim, self.token_group or self.page_size, self.channel_pack)

    def with_config(self, **changes: object) -> "Case":
        return replace(self, config=replace(self.config, **changes))


@dataclass(frozen=True)
class Inputs:
    queries: torch.Tensor
    keys: list[PagedKeys]
    block_tables: list[torch.Tensor]
    context_lens: np.ndarray


def draw(case: Case) -> Inputs:
    """Inputs of `case`; unused pages and the unused end of the last page hold NaN, so that a stray read shows."""
    rng = torch.Generator().manual_seed(case.seed)
    page, dim, layout = case.page_size, case.head_dim, case.layout
    per_row = [-(-context // page) for context in case.contexts]
    pages = case.tables * sum(per_row) + 3

    def values(*shape: int, spread: int) -> torch.Tensor:
        if case.grid:
            return torch.randint(-spread, spread + 1, shape, generator=rng).float()
        return torch.randn(shape, generator=rng) * spread

    # As in the engine, a page belongs to one table at a time.
    tables = []
    for order in torch.randperm(pages, generator=rng)[: case.tables * sum(per_row)].split(max(1, sum(per_row))):
        table = torch.full((len(per_row), max(1, *per_row)), -1, dtype=torch.int32)
        for row, part in enumerate(order.split(per_row)):
            table[row, : len(part)] = part.int()
        tables.append(table)

    keys = []
    for layer in range(case.layers):
        table = tables[layer % case.tables]
        logical = torch.full((pages, case.kv_heads, page, dim), torch.nan)
        for row, context in enumerate(case.contexts):
            for start in range(0, context, page):
                count = min(page, context - start)
                logical[table[row, start // page], :, :count] = values(case.kv_heads, count, dim, spread=2)
        cache = torch.full((pages, case.kv_heads, 2 * page * dim), torch.nan, dtype=case.dtype)
        cache[..., : page * dim] = layout.from_logical(logical.to(case.dtype))
        shaped = cache.view(pages, case.kv_heads, page, 2 * dim)
        sinks = torch.linspace(-5.0, 20.0, case.total_heads) if case.sinks and layer % 2 == 0 else None
        scale, softcap = 2.0 ** -(3 + layer % 2), case.softcap / (1 + layer)
        keys.append(PagedKeys(shaped, layout, scale, layer % case.tables, softcap, sinks))
    queries = values(case.layers, len(case.contexts), case.total_heads, dim, spread=3)
    return Inputs(queries.to(case.query_dtype or case.dtype), keys, tables, np.array(case.contexts, dtype=np.int32))
