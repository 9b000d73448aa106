"""A trace holds what the search found on the model's own queries and keys, and is there whole or not at all."""

import json
import resource
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stream_kernels.prefill import search_prefill
from stream_kernels.search import NO_BLOCK, SearchConfig
from stream_monitor.tracing import sparse_attention
from stream_monitor.tracing.attention import LayerInputs, dense_attention
from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.layer import TraceOptions
from stream_monitor.tracing.masks import MASKS, LayerMasks, MaskFile
from stream_monitor.tracing.model import TracedModel, load
from stream_monitor.tracing.pruning import PairCount
from stream_monitor.tracing.trace import SUMMARY, Progress, trace
from tests.tracing import tiny

SEARCH = SearchConfig(strategy="beam", block_size=8, top_k=2)


def recorded(model: TracedModel, ids: list[int]) -> list[LayerInputs]:
    """What the layers of the dense model are given."""
    seen: list[LayerInputs] = []

    def attend(inputs: LayerInputs) -> torch.Tensor:
        seen.append(inputs)
        return dense_attention(inputs)

    model.run(ids, attend)
    return seen


def test_masks_are_what_the_search_finds_in_the_real_model(model_dir: Path, tmp_path: Path) -> None:
    model = load(str(model_dir))
    text = " ".join(f"The {number}. sheep jumps over the fence." for number in range(20))
    ids = model.prompt_tokens(text)
    search = SearchConfig(strategy="beam", top_k=2)
    steps: list[Progress] = []
    done = trace(model, ids, TraceOptions(search, "dense", "mean"), tmp_path / "out", steps.append)

    masks = MaskFile(done.out / MASKS)
    assert masks.layers == model.layers == 30
    assert masks.metadata["tokens"] == ids
    assert masks.metadata["search"] == asdict(search)
    for inputs, layer in list(zip(recorded(model, ids), masks, strict=True))[::10]:
        found = search_prefill(inputs.queries, inputs.keys, search, scale=inputs.scale, reduction="mean")
        assert layer.first_position.tolist() == list(range(0, len(ids), 32))
        assert layer.rows.sum() == len(ids)
        assert np.array_equal(layer.block_ids, found.block_ids)
        assert np.array_equal(layer.forced_ids, found.forced_ids)
        shares = layer.block_shares.sum(-1) + layer.forced_shares.sum(-1) + layer.unobserved
        np.testing.assert_allclose(shares, 1, atol=1e-3)
        np.testing.assert_allclose(layer.keys_read, found.keys_read)
        assert (layer.block_shares[layer.block_ids == NO_BLOCK] == 0).all()

    assert [step.layer for step in steps] == list(range(1, 31))
    assert all(step.tokens_per_second > 0 and step.peak_bytes > 2**28 for step in steps)
    assert json.loads((done.out / SUMMARY).read_text()) == done.summary()
    hidden = model.run(ids, dense_attention)
    assert done.next_token == model.tokenizer.decode([int(model.logits(hidden[-1:]).argmax())])


def test_a_mask_that_keeps_everything_changes_nothing(tiny_model: TracedModel, tmp_path: Path) -> None:
    ids = tiny.tokens(333)
    everything = SearchConfig(strategy="exact", block_size=8, top_k=64)
    done = {
        kind: trace(tiny_model, ids, TraceOptions(everything, kind), tmp_path / kind) for kind in ("pruned", "dense")
    }
    assert done["pruned"].pairs == done["dense"].pairs
    blocks = -(-333 // 8)
    causal = tiny_model.layers * tiny_model.query_heads * blocks * (blocks + 1) // 2
    assert done["pruned"].pairs == PairCount(causal, causal, tiny_model.layers * tiny_model.query_heads * blocks**2)
    layers = [list(MaskFile(result.out / MASKS)) for result in done.values()]
    for pruned, dense in zip(*layers, strict=True):
        assert np.array_equal(np.sort(pruned.block_ids), np.sort(dense.block_ids))
        np.testing.assert_allclose(np.sort(pruned.block_shares), np.sort(dense.block_shares), atol=1e-4)


def test_what_is_pruned_reaches_the_next_layer(tiny_model: TracedModel, tmp_path: Path) -> None:
    ids = tiny.tokens(333)
    pruned, dense = (
        MaskFile(trace(tiny_model, ids, TraceOptions(SEARCH, kind), tmp_path / kind).out / MASKS)
        for kind in ("pruned", "dense")
    )
    assert np.array_equal(pruned.layer(0).block_ids, dense.layer(0).block_ids)
    assert not np.allclose(pruned.layer(1).unobserved, dense.layer(1).unobserved, rtol=1e-3)


def test_layers_with_a_window_keep_inside_it_and_are_named(windowed_model: TracedModel, tmp_path: Path) -> None:
    done = trace(windowed_model, tiny.tokens(400), TraceOptions(SEARCH), tmp_path / "out")
    assert done.windows == {1: 70, 2: 70}
    for number, layer in enumerate(MaskFile(done.out / MASKS)):
        last = layer.first_position[:, None, None] + layer.rows[:, None, None] - 1
        age = (last // 8 - layer.block_ids)[layer.block_ids != NO_BLOCK]
        assert age.max() <= 70 // 8 + 1 if number else age.max() > 20


class _Broken(Exception):
    pass


def _fail(error: BaseException) -> Callable[[Progress], None]:
    def progress(step: Progress) -> None:
        if step.layer == 2:
            raise error

    return progress


@pytest.mark.parametrize("error", [_Broken(), KeyboardInterrupt()])
def test_nothing_is_left_of_a_trace_that_was_broken_off(
    error: BaseException, tiny_model: TracedModel, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        trace(tiny_model, tiny.tokens(100), TraceOptions(SEARCH), tmp_path / "out", _fail(error))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_one_line_and_leaves_nothing(tiny_model: TracedModel, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(TracingError, match=r"cannot write .*out: .*File too large"):
            trace(tiny_model, tiny.tokens(400), TraceOptions(SEARCH), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tiny_model: TracedModel, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(TracingError, match="exists already"):
        trace(tiny_model, tiny.tokens(40), TraceOptions(SEARCH), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_taken(tiny_model: TracedModel, tmp_path: Path) -> None:
    trace(tiny_model, tiny.tokens(40), TraceOptions(SEARCH), tmp_path / "a" / "b")
    (tmp_path / "c").mkdir()
    done = trace(tiny_model, tiny.tokens(40), TraceOptions(SEARCH), tmp_path / "c")
    assert sorted(path.name for path in done.out.iterdir()) == [MASKS, SUMMARY]


@pytest.mark.parametrize("content", [b"", b"PAR1 not really"])
def test_what_is_not_a_file_of_masks_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(TracingError, match="cannot read the masks"):
        MaskFile(path)


class _Largest(TorchDispatchMode):
    """Notes the most elements that any tensor made while it is active has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("model", ["tiny_model", "windowed_model"])
def test_no_tensor_is_a_square_of_the_context(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this thread; the search, on threads of its own, has such a test where it lives."""
    monkeypatch.setattr(sparse_attention, "_TILE_NUMBERS", 2**16)
    tokens = 1500
    with _Largest() as seen:
        trace(request.getfixturevalue(model), tiny.tokens(tokens), TraceOptions(SEARCH), tmp_path / "out")
    assert seen.elements <= tokens * 2 * tiny.SHAPE["hidden_size"]


def test_masks_come_back_as_they_were_written(tiny_model: TracedModel, tmp_path: Path) -> None:
    ids = tiny.tokens(203)
    first = recorded(tiny_model, ids)[0]
    expected = LayerMasks.of(search_prefill(first.queries, first.keys, SEARCH, scale=first.scale, query_block=8))
    done = trace(tiny_model, ids, TraceOptions(SEARCH), tmp_path / "out")
    found = MaskFile(done.out / MASKS).layer(0)
    for name, value in vars(expected).items():
        assert vars(found)[name].dtype == value.dtype, name
        np.testing.assert_allclose(vars(found)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    # And as anyone reads Parquet.
    where = [("layer", "=", 0), ("query_block", "=", 20), ("head", "=", 3)]
    (row,) = pq.read_table(done.out / MASKS, filters=where).to_pylist()
    assert row["block_ids"] == expected.block_ids[20, 3].tolist()
    assert row["forced_ids"] == expected.forced_ids[20].tolist()
    assert row["first_position"] == 160
