"""When each KV block was last given away or rewritten, counted in steps."""

from collections.abc import Sequence

import numpy as np


class BlockGenerations:
    """Written by the runner thread before a step may rewrite blocks, read by the search before and after it reads keys.

    A row was taken in generation `now`; one of its blocks of a later generation makes it a raced row. The mark comes
    before the write, in program order, and the search's final look after its last read. (Block ids are unique over all
    KV cache groups: v1/core/block_pool.py.)

    Args:
        blocks: number of blocks of the engine.
    """

    def __init__(self, blocks: int) -> None:
        self.of_block = np.zeros(blocks, np.int64)
        """int64 [blocks], the step that last rewrote each block."""
        self.now = 0
        """The running step."""

    def next_step(self) -> None:
        """A step begins; marks from here on belong to it."""
        self.now += 1

    def mark(self, block_ids: Sequence[int]) -> None:
        """These blocks may be rewritten in the running step."""
        if block_ids:
            self.of_block[list(block_ids)] = self.now

    def mark_all(self) -> None:
        """Every block may be rewritten: sleep, weight update, new cache."""
        self.next_step()
        self.of_block[:] = self.now
