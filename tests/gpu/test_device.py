"""The GPU side bound to a cache: searches are right, late rows are raced, and the device waits only where it must.

Kernels are interpreted where there is no GPU, and streams stand still (`InlineStreams`): order between streams is not
tested there.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stream_kernels.cpu import ROW_INVALID, ROW_OK, ROW_RACED
from stream_kernels.reference import search as reference_search
from stream_kernels.search import SearchConfig
from stream_monitor.engine.binding import Binding
from stream_monitor.engine.blocks import BlockGenerations
from stream_monitor.engine.compat.layers import PagedLayerCache
from stream_monitor.engine.compat.runner import BatchRows, DeviceInputs
from stream_monitor.engine.compat.schedule import ScheduledRequest, ScheduledStep
from stream_monitor.engine.gpu.device import GpuDevice
from stream_monitor.engine.paged_keys import device_keys
from stream_monitor.engine.requests import RowLabel
from stream_monitor.engine.self_check import LayoutError
from stream_monitor.records import Phase
from tests.gpu.test_rows import DEVICE

LAYERS, HEADS, KV_HEADS, DIM, PAGE, PAGES, REQUESTS = 2, 2, 1, 16, 16, 40, 3
CONTEXT = 240
BEAM = SearchConfig(strategy="beam", block_size=16, top_k=2, width=2, box_width=2)


class Implementation:
    """Stores keys as vLLM's GPU backends do: [pages, kv_heads, page, keys and values]."""

    scale = DIM**-0.5

    def __init__(self, wrong: int = 0) -> None:
        self.stream_tap: Any = None
        self._wrong = wrong

    def do_kv_cache_update(self, layer: Any, key: torch.Tensor, value: Any, cache: torch.Tensor, slots: Any) -> None:
        if layer.kv_cache_dtype == "fp8":
            key = (key.float() / layer._k_scale_float).to(torch.float8_e4m3fn).view(torch.uint8)
        cache[slots // PAGE, :, (slots + self._wrong) % PAGE, :DIM] = key


def attention_layer(wrong: int, eight_bits: bool) -> SimpleNamespace:
    """What a device looks at in vLLM's layer; with `eight_bits` queries are quantised as well as keys."""
    quantised = {"kv_cache_dtype": "fp8", "query_quant": object(), "_k_scale_float": 0.37, "_q_scale_float": 0.8}
    plain = {"kv_cache_dtype": "auto", "query_quant": None}
    return SimpleNamespace(
        impl=Implementation(wrong), num_heads=HEADS, head_size=DIM, **(quantised if eight_bits else plain)
    )


class Runner:
    """Model runner V2's persistent inputs, and the batch of the last step."""

    def __init__(self) -> None:
        self.start_loc = torch.zeros(REQUESTS + 1, dtype=torch.int32, device=DEVICE)
        self.lengths = torch.zeros(REQUESTS, dtype=torch.int32, device=DEVICE)
        self.table = torch.zeros(REQUESTS, CONTEXT // PAGE, dtype=torch.int32, device=DEVICE)

    def block_tokens(self) -> list[int]:
        return [PAGE]

    def table_pages(self) -> list[int]:
        return [CONTEXT // PAGE]

    def query_start_loc(self) -> torch.Tensor:
        return self.start_loc

    def device_inputs(self) -> DeviceInputs:
        return DeviceInputs(self.lengths, [self.table])


class Rig:
    """An engine of two requests, `a` of 230 tokens and `b` of 40, whose cache holds random keys."""

    def __init__(
        self,
        config: SearchConfig = BEAM,
        order: str = "HND",
        wrong: int = 0,
        bound: bool = True,
        eight_bits: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (PAGES, KV_HEADS, PAGE, 2 * DIM) if order == "HND" else (PAGES, PAGE, KV_HEADS, 2 * DIM)
        numbers, key_type = (torch.float8_e4m3fn, torch.float8_e4m3fn) if eight_bits else (torch.float16, None)
        stored = [torch.randn(shape, generator=generator).to(numbers).to(DEVICE) for _ in range(LAYERS)]
        if eight_bits:
            stored = [tensor.view(torch.uint8) for tensor in stored]
        self.caches = [PagedLayerCache(t if order == "HND" else t.transpose(1, 2), 0, key_type) for t in stored]
        self.before = [cache.tensor.clone() for cache in self.caches]
        self.layers = [attention_layer(wrong, eight_bits) for _ in range(LAYERS)]
        self.runner = Runner()
        self.generations = BlockGenerations(PAGES)
        self.device = GpuDevice(self.layers, self.runner, REQUESTS, 1, numbers, share=0.5)
        self.config = config
        sizes = HEADS, tuple(range(HEADS)), REQUESTS, CONTEXT, torch.float16, numbers
        self.binding = Binding(self.runner, self.layers, self.caches, *sizes, self.generations)
        if not bound:
            return
        self.device.bind(self.binding, config, slots=2)
        self.held = {"a": list(range(2, 17)), "b": list(range(20, 23))}
        self.contexts = {"a": 230, "b": 40}
        self.begin(ScheduledRequest("a", 229, 1, 1, (), (self.held["a"],), True), self.request("b", fresh=True))
        for row, name in enumerate("ab"):
            self.runner.table[row, : len(self.held[name])] = torch.tensor(self.held[name], dtype=torch.int32)
            self.runner.lengths[row] = self.contexts[name]
        self.runner.start_loc[:] = torch.tensor([0, 1, 2, 2])
        self.queries = torch.randn(LAYERS, 2, HEADS, DIM, generator=generator).to(numbers).to(DEVICE)

    def request(self, name: str, fresh: bool = False, rewritten: tuple[int, ...] = ()) -> ScheduledRequest:
        blocks = (self.held.get(name, list(rewritten)),) if fresh else ()
        return ScheduledRequest(name, 0, 1, 0, rewritten, blocks, fresh)

    def begin(self, *requests: ScheduledRequest, finished: tuple[str, ...] = ()) -> None:
        """The runner thread before a step."""
        self.generations.next_step()
        for request in requests:
            self.generations.mark(request.rewritten_blocks)
        self.device.follow(ScheduledStep((), frozenset(), requests, frozenset(finished), ()))

    def forward(self) -> None:
        for layer, queries in zip(self.layers, self.queries, strict=True):
            layer.impl.stream_tap.take(queries, None)

    def snapshot(self, slot: int = 0, **contexts: int):
        """The runner thread after the forward pass."""
        places = self.contexts | contexts
        labels = [RowLabel(name, places[name] - 1, 0, Phase.DECODE, "", True) for name in ("b", "a")]
        taken = self.device.slots[slot]
        taken.open()
        assert taken.snapshot(BatchRows(["a", "b"], [], []), labels, self.generations.now) == ""
        return taken

    def step(self):
        self.forward()
        return self.snapshot()


@pytest.mark.parametrize(
    ("strategy", "order", "eight_bits"),
    [("beam", "HND", False), ("exact", "NHD", False), ("beam", "NHD", True), ("exact", "HND", True)],
)
def test_a_search_finds_what_the_reference_finds(strategy, order, eight_bits):
    rig = Rig(replace(BEAM, strategy=strategy), order, eight_bits=eight_bits)
    unchanged = [torch.equal(cache.tensor, before) for cache, before in zip(rig.caches, rig.before, strict=True)]
    assert all(unchanged), "the self-check left traces"
    for _ in range(2):  # with summaries built, then with those of before
        slot = rig.step()
        assert rig.device.search.run(slot).tolist() == [ROW_OK, ROW_OK]
        if eight_bits:
            assert device_keys(rig.caches, rig.layers)[0].scale == pytest.approx(DIM**-0.5 * 0.37 * 0.8)
        expected = reference_search(
            rig.queries.half()[:, [1, 0]].cpu(),
            [replace(key, tensor=key.tensor.cpu()) for key in device_keys(rig.caches, rig.layers)],
            [torch.tensor([rig.held["b"] + [0] * 12, rig.held["a"]], dtype=torch.int32)],
            torch.tensor([40, 230], dtype=torch.int32),
            rig.config,
        )
        found = rig.device.search.summary.first_rows(2)
        np.testing.assert_array_equal(found.block_ids, expected.block_ids)
        np.testing.assert_allclose(found.total_lse(), expected.total_lse(), atol=2e-3)
        audit = rig.device.search.audit(slot, 1, 1, 1)
        assert audit is not None
        assert (audit.row, audit.layer, audit.query_head) == (1, 1, 1)
        assert 0 < audit.recall <= 1.001
        assert strategy != "exact" or audit.recall == pytest.approx(1, abs=1e-3)


def test_a_writer_that_stores_keys_elsewhere_is_found_out():
    rig = Rig(wrong=1, bound=False)
    with pytest.raises(LayoutError, match="self-check failed"):
        rig.device.bind(rig.binding, BEAM, slots=2)


def test_rows_whose_blocks_were_given_away_before_the_search_are_raced():
    rig = Rig()
    slot = rig.step()
    rig.begin(rig.request("c", fresh=True, rewritten=(21,)), finished=("b",))
    assert rig.device.waits == 0, "nothing to wait for: the search is not enqueued"
    assert rig.device.search.run(slot).tolist() == [ROW_RACED, ROW_OK]


def test_what_was_built_of_a_raced_row_is_not_believed():
    rig = Rig()
    slot = rig.step()
    rig.begin(rig.request("c", fresh=True, rewritten=(9,)), finished=("a",))
    assert rig.device.search.run(slot).tolist() == [ROW_OK, ROW_RACED]
    for cache in rig.caches:  # the blocks' next keys, of which summaries must be made anew
        cache.tensor[:] = torch.randn_like(cache.tensor.float()).half()
    rig.begin(ScheduledRequest("a", 229, 1, 1, (), (rig.held["a"],), True))
    slot = rig.step()
    assert rig.device.search.run(slot).tolist() == [ROW_OK, ROW_OK]
    audits = [rig.device.search.audit(slot, layer, 1, head) for layer in range(LAYERS) for head in range(HEADS)]
    fresh = Rig()
    for cache, other in zip(fresh.caches, rig.caches, strict=True):
        cache.tensor[:] = other.tensor
    fresh.queries = rig.queries
    again = fresh.step()
    fresh.device.search.run(again)
    assert audits == [
        fresh.device.search.audit(again, layer, 1, head) for layer in range(LAYERS) for head in range(HEADS)
    ]


def enqueued(rig: Rig):
    """A slot whose search is enqueued and, as far as the runner thread can see, not done."""
    slot = rig.step()
    rig.device.search.run(slot)
    slot.finished = False
    return slot


def test_the_device_waits_where_a_block_that_is_being_read_is_given_away():
    rig = Rig()
    enqueued(rig)
    rig.begin(rig.request("c", fresh=True, rewritten=(21,)), finished=("b",))
    assert rig.device.waits == 1


def test_the_device_does_not_wait_for_others():
    rig = Rig()
    slot = enqueued(rig)
    rig.begin(rig.request("a"), rig.request("b"), rig.request("c", fresh=True, rewritten=(30,)))
    rig.begin(rig.request("c"), rig.request("d", fresh=True, rewritten=(31,)), finished=("b",))
    assert rig.device.waits == 0, "blocks that no row has"
    slot.finished = True
    rig.begin(rig.request("e", fresh=True, rewritten=(21,)))
    assert rig.device.waits == 0, "nobody reads any more"


def test_a_label_that_is_not_what_the_device_attended_to_is_invalid():
    rig = Rig()
    rig.forward()
    slot = rig.snapshot(b=39)
    assert rig.device.search.run(slot).tolist() == [ROW_INVALID, ROW_OK]


def test_a_layer_that_left_no_rows_is_a_fault():
    rig = Rig()
    slot = rig.step()
    rig.device.search.run(slot)
    rig.layers[0].impl.stream_tap.take(rig.queries[0], None)
    slot = rig.snapshot()
    with pytest.raises(RuntimeError, match="watched layer 1 left no query rows"):
        rig.device.search.run(slot)
