"""Which KV blocks may have been rewritten since a row was taken: a generation count per scheduler block."""

import numpy as np
from numpy.typing import NDArray


class BlockGenerations:
    """Written by the runner thread before a step may rewrite blocks, read by the estimator after it has read keys.

    A reader that finds the same generations before and after its read has read the keys of the row's own context: the
    bump comes before the write, in program order, and the final check after the last read. (Block ids are unique over
    all KV cache groups: v1/core/block_pool.py.)

    Args:
        blocks: number of scheduler blocks of the engine.
    """

    def __init__(self, blocks: int) -> None:
        self._generation = np.zeros(blocks, np.uint32)

    def bump(self, block_ids: list[int] | tuple[int, ...]) -> None:
        """These blocks may be rewritten from now on."""
        if block_ids:
            self._generation[list(block_ids)] += 1

    def bump_all(self) -> None:
        """Every block may be rewritten: sleep, weight update, new cache."""
        self._generation += 1

    def read(self, block_ids: NDArray[np.int32]) -> NDArray[np.uint32]:
        """Generations of `block_ids`, same shape; a copy."""
        return self._generation[block_ids]
