"""One request's attention head by head: kept for every sentence of its output, from when the sentence is scored."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import NO_SHARES, Head, HeadShares, vertical_scores_by_head
from stream_monitor.monitor.rows import Row

MAX_HEADS = 256
"""Heads of a request that are told apart, evenly those watched of each rank, as many as it is the first to bring."""
SINK = 0xFFFFFFFF
"""In place of a sentence: the entry lies on the context's first token and counts for none."""


class RequestHeads:
    """See the module.

    Attributes:
        heads: (layer, query head) of each place, in the order in which their ranks came.
        bytes: of what is kept.
    """

    def __init__(self) -> None:
        self.heads: list[Head] = []
        self.bytes = 0
        self._places: dict[Any, NDArray[np.int64]] = {}
        self._shares: dict[int, HeadShares] = {}

    def close(self, sentence: int, rows: Iterable[Row]) -> HeadShares:
        """Join the folded rows of a sentence, which lose their entries."""
        heads, columns, mass, count = [], [], [], 0
        for row in rows:
            if row.by_head is None:
                continue
            count += 1
            heads.append(self._places_of(row)[row.by_head.heads])
            columns.append(row.by_head.places)
            mass.append(row.by_head.mass)
            row.by_head = None
        shares = NO_SHARES
        if heads:
            places, of_entries = np.concatenate(heads), np.concatenate(columns)
            told = np.flatnonzero((places >= 0) & (of_entries != SINK))
            entries = places[told], of_entries[told].astype(np.int64), np.concatenate(mass)[told]
            shares = HeadShares.of_rows(*entries, count)
        if count:
            self._shares[sentence] = shares
            self.bytes += shares.nbytes
        return shares

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

    def newest(self, count: int) -> list[tuple[int, HeadShares]]:
        """The last so many of `sentences`: what is closed comes in order."""
        return list(islice(reversed(self._shares.items()), count))[::-1]

    def vertical_scores(self, size: int) -> NDArray[np.float64]:
        """float64 [heads, size]; see `vertical_scores_by_head`."""
        return vertical_scores_by_head(self.sentences(), len(self.heads), size)

    def _places_of(self, row: Row) -> NDArray[np.int64]:
        """Place of each (layer, head) of the row's sources; -1 for one that is not told apart."""
        if len(row.sources) == 1:
            return self._places_of_rank(row.sources[0][0])
        return np.concatenate([self._places_of_rank(rank) for rank, _ in row.sources])

    def _places_of_rank(self, rank: Any) -> NDArray[np.int64]:
        known = self._places.get(rank)
        if known is not None:
            return known
        engine = rank.engine
        watched = [
            (int(layer), int(engine.first_query_head + head)) for layer in engine.layers for head in engine.query_heads
        ]
        places = np.full(len(watched), -1)
        chosen = _evenly(len(watched), MAX_HEADS - len(self.heads))
        places[chosen] = len(self.heads) + np.arange(len(chosen))
        self.heads += [watched[place] for place in chosen]
        self._places[rank] = places
        return places


def sentences_of_entries(columns: NDArray[np.int64], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """What an entry on each key lies on, given the key's sentence: what is on the first token goes to `SINK`."""
    return np.where(keys == 0, np.uint32(SINK), columns.astype(np.uint32))


def _evenly(count: int, most: int) -> Sequence[int]:
    """At most `most` of 0 .. count - 1, at even steps."""
    if most <= 0:
        return []
    return range(0, count, -(-count // most)) if count > most else range(count)
