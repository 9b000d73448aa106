"""What a search on a GPU writes: `BlockSummary` on the device, in one piece of memory that is copied at once."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from stream_kernels.search import BlockSummary, SearchConfig


@dataclass(frozen=True)
class DeviceSummary:
    """Results of R rows on a device; see `BlockSummary` for fields of the same name.

    Attributes:
        storage: uint8 [bytes], the memory that all other fields are views of.
        block_ids: int32 [L, R, H, K].
        block_lse: float32 [L, R, H, K].
        strongest: uint8 [L, R, H, K].
        forced_lse: float32 [L, R, H, F].
        forced_strongest: uint8 [L, R, H, F].
        unobserved_lse: float32 [L, R, H].
        learned_sink_lse: float32 [L, R, H].
        unit_keys_read: float32 [L, R, U], key-equivalents that each unit read.
        status: uint8 [R], `ROW_OK` or `ROW_INVALID`; a row that is invalid may hold anything.
    """

    storage: torch.Tensor
    block_ids: torch.Tensor
    block_lse: torch.Tensor
    strongest: torch.Tensor
    forced_lse: torch.Tensor
    forced_strongest: torch.Tensor
    unobserved_lse: torch.Tensor
    learned_sink_lse: torch.Tensor
    unit_keys_read: torch.Tensor
    status: torch.Tensor

    @classmethod
    def allocate(
        cls,
        layers: int,
        rows: int,
        query_heads: int,
        units: int,
        config: SearchConfig,
        device: torch.device | str,
        pin_memory: bool = False,
    ) -> "DeviceSummary":
        """Memory for results, not filled. On the CPU it is where results are copied to, pinned if so asked."""
        lead, k, f = (layers, rows, query_heads), config.top_k, config.forced_blocks
        fields = {
            "block_ids": ((*lead, k), torch.int32),
            "block_lse": ((*lead, k), torch.float32),
            "forced_lse": ((*lead, f), torch.float32),
            "unobserved_lse": (lead, torch.float32),
            "learned_sink_lse": (lead, torch.float32),
            "unit_keys_read": ((layers, rows, units), torch.float32),
            "strongest": ((*lead, k), torch.uint8),
            "forced_strongest": ((*lead, f), torch.uint8),
            "status": ((rows,), torch.uint8),
        }
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in fields.values()]
        storage = torch.zeros(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pin_memory)
        parts = zip(fields.items(), storage.split(sizes), strict=True)
        return cls(storage, **{name: part.view(dtype).view(shape) for (name, (shape, dtype)), part in parts})

    def copy_(self, source: "DeviceSummary") -> None:
        """Copies all of `source`, allocated with the same sizes; into pinned memory without waiting."""
        self.storage.copy_(source.storage, non_blocking=True)

    def on_host(self) -> BlockSummary:
        """The same results for the host: views of this memory where it is on the CPU, else copies."""
        views = {
            name: getattr(self, name).cpu().numpy() for name in BlockSummary.__dataclass_fields__ if name != "keys_read"
        }
        total = self.unit_keys_read.cpu().numpy().sum(-1, dtype=np.float64)
        return BlockSummary(**views, keys_read=(total / self.block_ids.shape[2]).astype(np.float32))
