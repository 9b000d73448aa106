"""The self-check on the engine's cache: it finds a search that reads or weighs keys wrongly, and leaves no trace."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stream_kernels.cpu import CpuSearch
from stream_kernels.layout import KeyLayout, PagedKeys
from stream_kernels.search import BlockSummary, SearchConfig
from stream_monitor.engine.binding import Binding
from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.compat.layers import PagedLayerCache, learned_sinks, soft_cap
from stream_monitor.engine.cpu.device import CpuDevice
from stream_monitor.engine.cpu.slots import CpuSlot, LayerTap
from stream_monitor.engine.paged_keys import paged_keys
from stream_monitor.engine.self_check import LayoutError, check_against_dense

PAGE, HEADS, KV_HEADS, DIM, PAGES = 32, 4, 2, 16, 12
CONFIG = SearchConfig(strategy="exact", top_k=4)


class Implementation:
    """Stores keys row by row, as no CPU build of vLLM does, with logits that are capped or share with sinks."""

    scale = 0.5

    def __init__(self, softcap: float = 0.0, sinks: torch.Tensor | None = None) -> None:
        self.logits_soft_cap = softcap
        self.sinks = sinks

    def do_kv_cache_update(self, layer: Any, key: torch.Tensor, value: Any, cache: torch.Tensor, slots: Any) -> None:
        flat = cache.view(cache.shape[0], KV_HEADS, 2 * PAGE, DIM)
        flat[slots // PAGE, :, slots % PAGE] = key


def layer(**logits: Any) -> SimpleNamespace:
    return SimpleNamespace(
        impl=Implementation(**logits), num_heads=HEADS, head_size=DIM, kv_cache_dtype="auto", query_quant=None
    )


@pytest.fixture
def layers() -> list[SimpleNamespace]:
    """A capped layer, one with sinks, and one of another KV cache group that shares the first one's tensor."""
    sinks = torch.nn.Parameter(torch.tensor([3.0, -1.0, 0.0, 6.0], dtype=torch.bfloat16))
    return [layer(softcap=2.0), layer(sinks=sinks), layer()]


@pytest.fixture
def caches() -> list[PagedLayerCache]:
    first, second = torch.randn(2, PAGES, KV_HEADS, PAGE, 2 * DIM)
    return [PagedLayerCache(first, 0), PagedLayerCache(second, 0), PagedLayerCache(first, 2)]


def check(searched: list[PagedKeys], keys: list[PagedKeys], layers: list[Any], caches: list[PagedLayerCache]) -> None:
    """The self-check of a search over `searched`, where `keys` are right."""
    search = CpuSearch(searched, HEADS, CONFIG, max_rows=1, max_context=PAGES * PAGE, query_dtype=torch.float32)

    def search_once(queries: torch.Tensor, tables: list[Any], context: int) -> BlockSummary:
        summary = BlockSummary.allocate(len(keys), 1, HEADS, CONFIG)
        search.run(queries, tables, np.array([context], np.int32), summary)
        return summary

    heads = tuple(range(HEADS))
    types, generations = (torch.float32, torch.float32), BlockGenerations(PAGES)
    binding = Binding(None, layers, caches, HEADS, heads, 1, PAGES * PAGE, *types, generations)
    check_against_dense(search_once, keys, binding, CONFIG)


def test_caps_and_sinks_are_read_off_the_implementation(layers, caches):
    keys = paged_keys(caches, layers, torch.float32)
    assert [k.softcap for k in keys] == [2.0, 0.0, 0.0]
    assert [k.layout for k in keys] == [KeyLayout.row_major(PAGE, DIM)] * 3
    assert keys[0].sinks is None
    assert keys[1].sinks is not None
    assert keys[1].sinks.tolist() == [3.0, -1.0, 0.0, 6.0]
    with torch.no_grad():
        layers[1].impl.sinks.zero_()
    assert keys[1].sinks.tolist() == [3.0, -1.0, 0.0, 6.0], "a copy: it changes only when the search is told"
    assert learned_sinks(layers[1]).tolist() == [0.0] * HEADS
    assert soft_cap(layers[0]) == 2.0


def test_a_right_search_passes_and_the_cache_is_as_before(layers, caches):
    before = [cache.tensor.clone() for cache in caches]
    keys = paged_keys(caches, layers, torch.float32)
    check(keys, keys, layers, caches)
    assert all(torch.equal(cache.tensor, content) for cache, content in zip(caches, before, strict=True))


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ({0}, {"softcap": 0.0}),
        ({0}, {"softcap": 3.0}),
        ({1}, {"sinks": None}),
        ({1}, {"sinks": torch.zeros(HEADS)}),
        ({2}, {"scale": 0.6}),
        ({0, 1, 2}, {"layout": KeyLayout(PAGE, DIM, PAGE, 1)}),
    ],
)
def test_a_search_that_weighs_or_reads_otherwise_is_found_out(layers, caches, where, wrong):
    keys = paged_keys(caches, layers, torch.float32)
    searched = [replace(k, **wrong) if n in where else k for n, k in enumerate(keys)]
    with pytest.raises(LayoutError, match="self-check failed"):
        check(searched, keys, layers, caches)


class Runner:
    """Tables of three KV cache groups, of which the second has no watched layer."""

    def table_pages(self) -> list[int]:
        return [PAGES, 1, PAGES]

    def block_tokens(self) -> list[int]:
        return [PAGE, PAGE, PAGE]


def bind(layers: list[Any], caches: list[PagedLayerCache], rows: int = 4, drafts: int = 0) -> CpuDevice:
    """The device over these caches, its self-check passed."""
    device = CpuDevice(layers, drafts + 1)
    generations = BlockGenerations(PAGES)
    heads = tuple(range(HEADS))
    types = torch.float32, torch.float32
    binding = Binding(Runner(), layers, caches, HEADS, heads, rows, PAGES * PAGE, *types, generations)
    device.bind(binding, CONFIG, 2)
    return device


@pytest.mark.parametrize("drafts", [0, 1])
def test_two_requests_in_a_step_get_each_its_own_keys(layers, caches, drafts):
    before = [cache.tensor.clone() for cache in caches]
    bind(layers, caches, drafts=drafts)
    assert all(torch.equal(cache.tensor, content) for cache, content in zip(caches, before, strict=True))


def swapped_ids(native: Any) -> Any:
    return lambda self, batch, labels, now: native(
        self, replace(batch, request_ids=batch.request_ids[::-1]), labels, now
    )


def swapped_tables(native: Any) -> Any:
    def snapshot(self: Any, batch: Any, labels: Any, now: int) -> str:
        tables = [table[::-1] for table in batch.block_tables]
        return str(native(self, replace(batch, block_tables=tables), labels, now))

    return snapshot


def first_rows(native: Any) -> Any:
    return lambda self, query, starts: native(self, query, torch.tensor([0, 1, 4]))


@pytest.mark.parametrize(
    ("of", "method", "wrong"),
    [(CpuSlot, "snapshot", swapped_ids), (CpuSlot, "snapshot", swapped_tables), (LayerTap, "take", first_rows)],
)
def test_a_row_of_another_request_is_found_out(layers, caches, monkeypatch, of, method, wrong):
    monkeypatch.setattr(of, method, wrong(getattr(of, method)))
    with pytest.raises(LayoutError, match="ownership check failed"):
        bind(layers, caches)


def test_a_batch_of_one_has_nobody_to_be_taken_for(layers, caches, monkeypatch):
    monkeypatch.setattr(CpuSlot, "snapshot", swapped_ids(CpuSlot.snapshot))
    bind(layers, caches, rows=1)


def test_a_cache_without_a_page_for_each_group_is_refused(layers, caches):
    few = [PagedLayerCache(cache.tensor[:2], cache.group) for cache in caches]
    keys = paged_keys(few, layers, torch.float32)
    with pytest.raises(LayoutError, match="no page to check"):
        check(keys, keys, layers, few)
