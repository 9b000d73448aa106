"""Channels of a Harmony chat (gpt-oss): the name behind `<|channel|>` says whether reasoning or the answer follows.

openai/harmony: `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`. The name is
an ordinary word, so that a table of flags per token cannot know it: what it means depends on the token before.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_monitor.records import TokenFlag

_MARK = "<|channel|>"
_NAMES = {
    "analysis": TokenFlag.OPENS_REASONING,
    # Calls of tools and what is said about them: not the answer.
    "commentary": TokenFlag.OPENS_REASONING,
    "final": TokenFlag.CLOSES_REASONING,
}


@dataclass(frozen=True)
class Channels:
    """The mark of a channel, and the first token of each name to its flag."""

    mark: int
    names: dict[int, TokenFlag]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "Channels | None":
        """None for a tokenizer without channels."""
        mark = tokenizer.get_vocab().get(_MARK)
        if mark is None:
            return None
        firsts = {name: tokenizer.encode(name, add_special_tokens=False)[:1] for name in _NAMES}
        return cls(mark, {ids[0]: _NAMES[name] for name, ids in firsts.items() if ids})

    def add_flags(self, flags: NDArray[np.uint8], token_ids: NDArray[np.int64], before: int) -> None:
        """Adds what names mean to `flags` [n] of `token_ids` [n]; `before` is the token ahead of all, -1 for none."""
        if not len(token_ids):
            return
        marked = token_ids[:-1] == self.mark
        for index in (np.flatnonzero(np.concatenate([[before == self.mark], marked]))).tolist():
            flags[index] |= self.names.get(int(token_ids[index]), 0)
