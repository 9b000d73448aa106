"""What a run leaves: points of recall against keys read."""

from dataclasses import dataclass

from benchmarks.recall.frontier import Point
from benchmarks.recall.truth import Figures

BEAM = "beam"
DEFAULT = "default"
"""The setting of `beam` that users get."""

ORACLE = "oracle"


@dataclass(frozen=True)
class Measured:
    """One point of the plot.

    Attributes:
        method: name, the same for all settings of its sweep.
        setting: which of them.
        top_k: blocks kept.
        reads: key-equivalents per query head over the keys of the context, forced blocks counted.
        figures: what was reached.
    """

    method: str
    setting: str
    top_k: int
    reads: float
    figures: Figures


@dataclass(frozen=True)
class Case:
    """One text through one model.

    Attributes:
        model: name of its folder.
        tokens: wanted; `length` is what the text has.
        text: kind of text.
        group: query heads per KV head.
        points: everything measured.
    """

    model: str
    tokens: int
    text: str
    length: int
    group: int
    points: list[Measured]

    def methods(self) -> list[str]:
        """Names in the order they were run, the oracle left out."""
        return [name for name in dict.fromkeys(point.method for point in self.points) if name != ORACLE]

    def curve(self, method: str, top_k: int, figure: str = "inner") -> list[Point]:
        """Reads and a figure of every setting of a method."""
        return [
            (point.reads, getattr(point.figures, figure))
            for point in self.points
            if (point.method, point.top_k) == (method, top_k)
        ]
