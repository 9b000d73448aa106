"""Routes: how what stands in a needle's blocks can reach the answer, layer by layer, through kept blocks.

A node is a block of tokens before a layer; the last nodes stand behind the last layer. In each layer a block keeps what
it has (the residual stream, weight 1) and may read an earlier block, with the largest share that any of its heads gives
it: one head is enough to carry a needle. A route from the needle to the answer is as strong as the product of its
weights. That is an upper bound on a path through attention, not a measure of what the values hold.

Shares are those in the masks, reduced over the 32 rows of a query block as the trace was told to. The answer's node is
the last block of queries, whose last row the next token is sampled from.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_kernels.search import NO_BLOCK
from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.masks import LayerMasks

ROUTES = "routes.json"
"""Name of the file in the folder of a trace."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Edges:
    """Reads of one layer, n of them: int64 [n] query and key blocks, key before query; float64 [n] weights."""

    query: Ints
    key: Ints
    weight: Floats


@dataclass(frozen=True)
class Hop:
    """One edge of a route; `through` is the strength of the strongest route that uses it."""

    layer: int
    query_block: int
    key_block: int
    weight: float
    through: float


@dataclass(frozen=True)
class Routes:
    """All routes between a needle and the answer over B blocks and L layers.

    Attributes:
        needle: its tokens [start, end).
        sources: the needle's blocks; target: the answer's.
        blocks: B.
        layers: edges of each layer.
        through: float64 [n] for each layer, strength of the strongest route through each edge; 0 where none is.
        path: edges of the strongest route, first layer first; stays in the residual stream are left out.
        strength: of that route; 0 if there is none.
    """

    needle: tuple[int, int]
    sources: tuple[int, ...]
    target: int
    blocks: int
    layers: Sequence[Edges]
    through: Sequence[Floats]
    path: tuple[Hop, ...]
    strength: float

    def strongest_edges(self, count: int) -> list[Hop]:
        """At most `count` edges that lie on a route, strongest route first."""
        hops = [self._hop(layer, place) for layer, some in enumerate(self.through) for place in _largest(some, count)]
        return sorted((hop for hop in hops if hop.through > 0), key=lambda hop: -hop.through)[:count]

    def _hop(self, layer: int, place: int) -> Hop:
        edges = self.layers[layer]
        return _hop(layer, edges, place, float(self.through[layer][place]))

    def corners(self) -> tuple[list[int], list[int]]:
        """Block and layer of each corner of the strongest route, needle first; empty if there is none."""
        if not self.strength:
            return [], []
        blocks, layers = [self.path[0].key_block if self.path else self.target], [0]
        for hop in self.path:
            blocks += [hop.key_block, hop.query_block]
            layers += [hop.layer, hop.layer + 1]
        return [*blocks, self.target], [*layers, len(self.layers)]

    def summary(self, count: int = 100) -> dict[str, Any]:
        """JSON values: the strongest route and the `count` strongest edges."""
        return {
            "needle_tokens": list(self.needle),
            "needle_blocks": list(self.sources),
            "answer_block": self.target,
            "strength": self.strength,
            "weight": "largest share over heads",
            "path": [vars(hop) for hop in self.path],
            "edges": [vars(hop) for hop in self.strongest_edges(count)],
        }


def _largest(values: Floats, count: int) -> list[int]:
    return [int(place) for place in np.argsort(-values, kind="stable")[:count]]


def _hop(layer: int, edges: Edges, place: int, through: float) -> Hop:
    return Hop(layer, int(edges.query[place]), int(edges.key[place]), float(edges.weight[place]), through)


def layer_edges(masks: LayerMasks) -> Edges:
    """Reads of earlier blocks in one layer, each with the largest share over the heads.

    >>> import numpy as np
    >>> ids, shares = np.array([[[0], [0]], [[0], [-1]]]), np.array([[[0.1], [0.1]], [[0.2], [0.0]]])
    >>> forced = {"forced_ids": np.array([[-1], [0]]), "forced_shares": np.array([[[0.0], [0.0]], [[0.3], [0.4]]])}
    >>> rest = dict.fromkeys(("first_position", "rows", "unobserved", "keys_read"), np.zeros(2))
    >>> layer_edges(LayerMasks(block_ids=ids, block_shares=shares, **forced, **rest))
    Edges(query=array([1]), key=array([0]), weight=array([0.4]))
    """
    blocks, heads, _ = masks.block_ids.shape
    forced = np.broadcast_to(masks.forced_ids[:, None], (blocks, heads, masks.forced_ids.shape[1]))
    key = np.concatenate([masks.block_ids, forced], axis=2).astype(np.int64)
    weight = np.concatenate([masks.block_shares, masks.forced_shares], axis=2).astype(np.float64)
    query = np.broadcast_to(np.arange(blocks)[:, None, None], key.shape)
    earlier = (key != NO_BLOCK) & (key < query)
    codes = query[earlier] * blocks + key[earlier]
    distinct, inverse = np.unique(codes, return_inverse=True)
    largest = np.zeros(len(distinct))
    np.maximum.at(largest, inverse, weight[earlier])
    return Edges(distinct // blocks, distinct % blocks, largest)


def find_routes(masks: Iterable[LayerMasks], block_size: int, needle: tuple[int, int]) -> Routes:
    """Routes from the tokens [start, end) of `needle` to the last token.

    Args:
        masks: of every layer, with query blocks as long as key blocks.
        block_size: tokens per block.
        needle: its tokens, all within the context.
    """
    layers, blocks = [], 0
    for layer in masks:
        layers.append(layer_edges(layer))
        blocks = len(layer.rows)
    sources = tuple(range(needle[0] // block_size, (needle[1] - 1) // block_size + 1))
    forward = [_at(sources, blocks)]
    for edges in layers:
        forward.append(_stronger(forward[-1], edges.query, edges.weight * forward[-1][edges.key]))
    backward = [_at((blocks - 1,), blocks)]
    for edges in reversed(layers):
        backward.append(_stronger(backward[-1], edges.key, edges.weight * backward[-1][edges.query]))
    backward.reverse()
    through = [
        forward[number][edges.key] * edges.weight * backward[number + 1][edges.query]
        for number, edges in enumerate(layers)
    ]
    strength = float(forward[-1][blocks - 1])
    path = _strongest(layers, forward, blocks - 1, strength) if strength else ()
    return Routes(needle, sources, blocks - 1, blocks, layers, through, path, strength)


def _at(places: Sequence[int], blocks: int) -> Floats:
    """1 at some blocks, 0 at the others, float64 [B]."""
    strengths = np.zeros(blocks)
    strengths[list(places)] = 1
    return strengths


def _stronger(strengths: Floats, places: Ints, candidates: Floats) -> Floats:
    """`strengths` [B], or what comes over an edge to a place if that is stronger."""
    after = strengths.copy()
    np.maximum.at(after, places, candidates)
    return after


def _strongest(layers: Sequence[Edges], forward: Sequence[Floats], target: int, strength: float) -> tuple[Hop, ...]:
    """The strongest route, walked back from the target; it stays in the residual stream where that is as strong."""
    hops, block = [], target
    for number in reversed(range(len(layers))):
        if forward[number][block] == forward[number + 1][block]:
            continue
        edges = layers[number]
        here = np.flatnonzero(edges.query == block)
        place = int(here[np.argmax(edges.weight[here] * forward[number][edges.key[here]])])
        hops.append(_hop(number, edges, place, strength))
        block = int(edges.key[place])
    return tuple(reversed(hops))


def route_difference(one: Routes, other: Routes, count: int) -> list[tuple[Hop, float]]:
    """The `count` edges whose `through` differs most, such as between a success and a failure.

    Returns each edge as `one` has it (weight and `through` 0 where it lacks it) and the difference one - other.

    Raises:
        TracingError: the two differ in layers or blocks, so that their edges cannot be told to be the same.
    """
    if (len(one.layers), one.blocks) != (len(other.layers), other.blocks):
        raise TracingError(
            f"routes over {len(one.layers)} layers and {one.blocks} blocks cannot be compared with routes over "
            f"{len(other.layers)} layers and {other.blocks} blocks"
        )
    found: list[tuple[Hop, float]] = []
    for layer in range(len(one.layers)):
        mine, theirs = (_by_edge(routes, layer) for routes in (one, other))
        for edge in mine.keys() | theirs.keys():
            weight, through = mine.get(edge, (0.0, 0.0))
            change = through - theirs.get(edge, (0.0, 0.0))[1]
            if change:
                found.append((Hop(layer, *edge, weight, through), change))
    return sorted(found, key=lambda pair: -abs(pair[1]))[:count]


def _by_edge(routes: Routes, layer: int) -> dict[tuple[int, int], tuple[float, float]]:
    """Weight and `through` of the edges of a layer that lie on a route, by (query, key)."""
    edges, through = routes.layers[layer], routes.through[layer]
    return {
        (int(edges.query[place]), int(edges.key[place])): (float(edges.weight[place]), float(through[place]))
        for place in np.flatnonzero(through)
    }
