"""Routes of one trace beside those of another over as many blocks: such as a right answer's beside a wrong one's."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.masks import MASKS, MaskFile
from stream_monitor.tracing.parquet import readable
from stream_monitor.tracing.routes import ROUTES, Hop, Routes, find_routes, route_difference


@dataclass(frozen=True)
class OtherTrace:
    """A finished trace with a needle.

    Attributes:
        folder: where it lies.
        masks: its file.
        needle: tokens [start, end) of its needle.
    """

    folder: Path
    masks: MaskFile
    needle: tuple[int, int]

    @classmethod
    def open(cls, folder: Path, layers: int, tokens: int, block_size: int) -> "OtherTrace":
        """The trace in `folder`, which must fit one of so many layers, tokens and tokens per block.

        Raises:
            TracingError: it is no trace with a needle, or its blocks are not the same.
        """
        try:
            start, end = map(int, json.loads((folder / ROUTES).read_text(encoding="utf-8"))["needle_tokens"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise TracingError(f"{folder} is not a trace made with --needle: it has no readable {ROUTES}") from error
        masks = MaskFile(folder / MASKS)
        with readable(folder / MASKS, "masks"):
            size = int(masks.metadata["search"]["block_size"])
            own, other = -(-tokens // block_size), -(-len(masks.metadata["tokens"]) // size)
        if (layers, own, block_size) != (masks.layers, other, size):
            raise TracingError(
                f"{folder} has {masks.layers} layers and {other} blocks of {size} tokens; its routes cannot be "
                f"compared with those over {layers} layers and {own} blocks of {block_size}"
            )
        return cls(folder, masks, (start, end))

    def compare(self, routes: Routes) -> "Comparison":
        """With the routes of a trace that it fits."""
        theirs = find_routes(self.masks, int(self.masks.metadata["search"]["block_size"]), self.needle)
        return Comparison(str(self.folder), theirs.strength, tuple(route_difference(routes, theirs, _EDGES)))


_EDGES = 100
"""Edges of a comparison that are kept."""


@dataclass(frozen=True)
class Comparison:
    """How routes differ from those of another trace.

    Attributes:
        other: its folder.
        strength: of its strongest route.
        edges: those whose `through` differs most, and by how much: positive where it is stronger here.
    """

    other: str
    strength: float
    edges: tuple[tuple[Hop, float], ...]

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        edges = [vars(hop) | {"difference": difference} for hop, difference in self.edges]
        return {"trace": self.other, "strength": self.strength, "edges": edges}
