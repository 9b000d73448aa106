"""One request's attention head by head: kept for every sentence of its output, from when the sentence is scored."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import NO_SHARES, Head, HeadShares, weights
from stream_monitor.anchors.probe import Probe

MAX_HEADS = 256
"""Heads of a request that are told apart, evenly those watched of each rank, as many as it is the first to bring."""

_Weigh = Callable[[Sequence[Head]], NDArray[np.float64]]
_NO_WEIGHTS = np.zeros(0)


class RequestHeads:
    """See the module.

    Attributes:
        heads: (layer, query head) of each place, in the order in which their ranks came.
        bytes: of what is kept.
        opening: number of the prompt's last sentence, and what its last row reads; see `anchors/untrusted.py`. It is no
            sentence of the output.
    """

    def __init__(self) -> None:
        self.heads: list[Head] = []
        self.bytes = 0
        self.opening: tuple[int, HeadShares] | None = None
        self._places: dict[Any, NDArray[np.uint16]] = {}
        self._shares: dict[int, HeadShares] = {}
        self._weights: dict[int, tuple[object, int, NDArray[np.float64]]] = {}

    def weights(self, receivers: tuple[Head, ...]) -> NDArray[np.float64]:
        """What each head counts; see `heads.weights`."""
        return self._weighed(receivers, lambda heads: weights(heads, receivers))

    def probed(self, probe: Probe) -> NDArray[np.float64]:
        """What each head counts by a probe; see `Probe.weights_of`."""
        return self._weighed(probe, probe.weights_of)

    def put(self, sentence: int, shares: HeadShares) -> None:
        """Keep what a scored sentence reads."""
        self._shares[sentence] = shares
        self.bytes += shares.nbytes

    def put_opening(self, sentence: int, shares: HeadShares) -> None:
        """Keep what the opening reads."""
        self.opening = sentence, shares
        self.bytes += shares.nbytes

    def of(self, sentence: int) -> HeadShares:
        """What was kept of a sentence."""
        return self._shares.get(sentence, NO_SHARES)

    def sentences(self) -> list[tuple[int, HeadShares]]:
        """Number and shares of each sentence of which a row was captured, ascending."""
        return list(self._shares.items())

    def drop_from(self, sentence: int) -> None:
        """Forget this sentence and those after it."""
        for number in [number for number in self._shares if number >= sentence]:
            self.bytes -= self._shares.pop(number).nbytes
        if self.opening is not None and self.opening[0] >= sentence:
            self.bytes -= self.opening[1].nbytes
            self.opening = None

    def newest(self, count: int) -> list[tuple[int, HeadShares]]:
        """The last so many of `sentences`: what is closed comes in order."""
        return list(islice(reversed(self._shares.items()), count))[::-1]

    def of_entries(self, rank: Any) -> NDArray[np.uint16]:
        """Place of the head of each entry of a row of this rank; `MAX_HEADS` for a head that is not told apart."""
        known = self._places.get(rank)
        if known is not None:
            return known
        engine = rank.engine
        watched = [
            (int(layer), int(engine.first_query_head + head)) for layer in engine.layers for head in engine.query_heads
        ]
        places = np.full(len(watched), MAX_HEADS, np.uint16)
        chosen = _evenly(len(watched), MAX_HEADS - len(self.heads))
        places[chosen] = len(self.heads) + np.arange(len(chosen))
        self.heads += [watched[place] for place in chosen]
        geometry = engine.geometry
        known = np.repeat(places, geometry.top_k + geometry.sink_blocks + geometry.recent_blocks)
        self._places[rank] = known
        return known

    def _weighed(self, by: tuple[Head, ...] | Probe, weigh: _Weigh) -> NDArray[np.float64]:
        # By identity, as neither is hashed quickly; what is kept beside the weights keeps its number its own.
        _, heads, found = self._weights.get(id(by), (None, -1, _NO_WEIGHTS))
        if heads != len(self.heads):
            found = weigh(self.heads)
            self._weights[id(by)] = by, len(self.heads), found
        return found


def _evenly(count: int, most: int) -> Sequence[int]:
    """At most `most` of 0 .. count - 1, at steps as even as can be."""
    return range(count) if count <= most else [place * count // most for place in range(most)]
