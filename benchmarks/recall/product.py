"""The product's own searches, over captured keys in a cache like the engine's."""

import numpy as np
import torch

from benchmarks.attention import Attention
from benchmarks.paging import paged
from stream_kernels.cpu import CpuSearch
from stream_kernels.search import BlockSummary, SearchConfig


class Product:
    """Runs `CpuSearch` on the last rows of a text."""

    def __init__(self, attention: Attention) -> None:
        self._queries = attention.queries
        self._tokens = attention.tokens
        self._keys = [paged(keys, attention.scale) for keys in attention.keys]

    def run(self, config: SearchConfig) -> tuple[BlockSummary, float]:
        """The summary of all rows, and key-equivalents read per query head over the keys of the context, averaged."""
        layers, rows, heads, _ = self._queries.shape
        contexts = np.arange(self._tokens - rows + 1, self._tokens + 1, dtype=np.int32)
        out = BlockSummary.allocate(layers, rows, heads, config)
        found = CpuSearch(
            self._keys, heads, config, max_rows=rows, max_context=self._tokens, query_dtype=self._queries.dtype
        )
        pages = np.arange(self._keys[0].num_pages, dtype=np.int32)
        found.run(self._queries, [np.tile(pages, (rows, 1))], contexts, out)
        return out, float((out.keys_read / contexts).mean())


def unobserved_share(summary: BlockSummary) -> torch.Tensor:
    """The summary's estimate of the attention neither kept nor forced, float32 [L, R, H]."""
    return torch.from_numpy(np.exp(summary.unobserved_lse - summary.total_lse()))
