"""Routes against every route there is."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_kernels.search import NO_BLOCK
from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.masks import LayerMasks
from stream_monitor.tracing.routes import Routes, find_routes, route_difference

BLOCKS, HEADS, LAYERS, SIZE = 6, 2, 3, 8


def layer_of(seed: int, blocks: int = BLOCKS) -> LayerMasks:
    """Masks with two kept blocks a head where there are so many, and the own block forced."""
    draw = np.random.default_rng(seed)
    ids = np.full((blocks, HEADS, 2), NO_BLOCK, np.int32)
    for block, head in itertools.product(range(blocks), range(HEADS)):
        some = draw.permutation(block)[:2]
        ids[block, head, : len(some)] = some
    shares = np.where(ids == NO_BLOCK, 0, draw.uniform(0.05, 0.5, ids.shape)).astype(np.float32)
    return LayerMasks(
        first_position=SIZE * np.arange(blocks, dtype=np.int32),
        rows=np.full(blocks, SIZE, np.int32),
        block_ids=ids,
        block_shares=shares,
        forced_ids=np.arange(blocks, dtype=np.int32)[:, None],
        forced_shares=np.full((blocks, HEADS, 1), 0.9, np.float32),
        unobserved=np.zeros((blocks, HEADS), np.float32),
        keys_read=np.zeros(blocks, np.float32),
    )


def weights(layer: LayerMasks) -> NDArray[np.float64]:
    """Query by key block, 1 on the diagonal."""
    found = np.eye(len(layer.rows))
    for block, head, place in np.ndindex(layer.block_ids.shape):
        key = layer.block_ids[block, head, place]
        if key != NO_BLOCK:
            found[block, key] = max(found[block, key], layer.block_shares[block, head, place])
    return found


def strongest_by_hand(layers: list[LayerMasks], sources: tuple[int, ...]) -> tuple[float, dict[tuple[int, ...], float]]:
    """Strength of the strongest route, and of the strongest through each (layer, query, key)."""
    tables = [weights(layer) for layer in layers]
    best, through = 0.0, {}
    for start, *inner in itertools.product(sources, *[range(BLOCKS)] * (LAYERS - 1)):
        nodes = [start, *inner, BLOCKS - 1]
        strength = np.prod([tables[layer][nodes[layer + 1], nodes[layer]] for layer in range(LAYERS)])
        best = max(best, strength)
        for layer in range(LAYERS):
            if nodes[layer] != nodes[layer + 1]:
                edge = (layer, nodes[layer + 1], nodes[layer])
                through[edge] = max(through.get(edge, 0.0), strength)
    return best, {edge: strength for edge, strength in through.items() if strength}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("needle", "sources"), [((3, 8), (0,)), ((9, 18), (1, 2))])
def test_the_strongest_routes_are_found(seed: int, needle: tuple[int, int], sources: tuple[int, ...]) -> None:
    layers = [layer_of(10 * seed + number) for number in range(LAYERS)]
    routes = find_routes(layers, SIZE, needle)
    best, through = strongest_by_hand(layers, sources)
    assert (routes.sources, routes.target, routes.blocks) == (sources, BLOCKS - 1, BLOCKS)
    assert routes.strength == pytest.approx(best)
    assert np.prod([hop.weight for hop in routes.path]) == pytest.approx(best)
    blocks, heights = routes.corners()
    assert blocks[0] in sources
    assert (blocks[-1], heights[0], heights[-1]) == (BLOCKS - 1, 0, LAYERS)
    for before, after in itertools.pairwise(routes.path):
        assert before.layer < after.layer
        assert before.query_block == after.key_block
    found = {(hop.layer, hop.query_block, hop.key_block): hop.through for hop in routes.strongest_edges(10**6)}
    assert found == pytest.approx(through)
    assert [hop.through for hop in routes.strongest_edges(3)] == sorted(through.values(), reverse=True)[:3]


def test_without_a_chain_of_kept_blocks_there_is_no_route() -> None:
    layer = layer_of(0)
    layer.block_ids[...] = NO_BLOCK
    routes = find_routes([layer], SIZE, (0, 1))
    assert (routes.strength, routes.path, routes.corners(), routes.strongest_edges(5)) == (0, (), ([], []), [])


def routes_of(seed: int) -> Routes:
    return find_routes([layer_of(seed + number) for number in range(LAYERS)], SIZE, (0, 8))


def test_the_difference_of_two_traces_names_edges_of_either() -> None:
    one, other = routes_of(0), routes_of(50)
    mine, theirs = (
        {(hop.layer, hop.query_block, hop.key_block): hop.through for hop in routes.strongest_edges(10**6)}
        for routes in (one, other)
    )
    found = route_difference(one, other, 10**6)
    expected = {edge: mine.get(edge, 0) - theirs.get(edge, 0) for edge in mine.keys() | theirs.keys()}
    assert {(hop.layer, hop.query_block, hop.key_block): change for hop, change in found} == pytest.approx(expected)
    assert route_difference(one, other, 2) == found[:2]
    assert abs(found[0][1]) == max(map(abs, expected.values()))
    assert route_difference(one, one, 5) == []
    with pytest.raises(TracingError, match="3 layers and 6 blocks cannot be compared with routes over 1 layers and 9"):
        route_difference(one, find_routes([layer_of(0, 9)], SIZE, (0, 8)), 5)
