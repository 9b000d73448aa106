"""Key layouts: recovered from an engine's own writer, refused where nothing explains them."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_kernels.layout import KeyLayout, PagedKeys, probe_permutation


@st.composite
def layouts(draw: st.DrawFn) -> KeyLayout:
    group, pack = draw(st.sampled_from([1, 2, 8, 16])), draw(st.sampled_from([1, 2, 4]))
    return KeyLayout(group * draw(st.integers(1, 4)), pack * draw(st.integers(1, 20)), group, pack)


@settings(max_examples=30, deadline=None)
@given(layouts())
def test_a_layout_is_found_again_from_its_permutation(layout: KeyLayout) -> None:
    offsets = layout.offsets()
    assert sorted(offsets.flatten().tolist()) == list(range(layout.page_size * layout.head_dim))
    assert np.array_equal(KeyLayout.from_permutation(offsets).offsets(), offsets)


@settings(max_examples=30, deadline=None)
@given(layouts())
def test_to_logical_undoes_from_logical(layout: KeyLayout) -> None:
    keys = torch.arange(3 * layout.page_size * layout.head_dim).view(3, layout.page_size, layout.head_dim)
    stored = layout.from_logical(keys)
    assert torch.equal(layout.to_logical(stored), keys)
    assert stored[1, layout.offsets()[-1, 0]] == keys[1, -1, 0]


def test_the_three_known_layouts() -> None:
    assert KeyLayout(32, 64, 32, 1).offsets()[5, 3] == 3 * 32 + 5
    assert KeyLayout(32, 64, 16, 2).offsets()[17, 3] == 16 * 64 + 1 * 32 + 1 * 2 + 1
    assert KeyLayout.row_major(32, 64).offsets()[5, 3] == 5 * 64 + 3
    assert KeyLayout.from_permutation(np.arange(32 * 64).reshape(32, 64)) == KeyLayout.row_major(32, 64)


def test_an_unknown_permutation_is_refused() -> None:
    shuffled = np.random.default_rng(0).permutation(32 * 64).reshape(32, 64)
    with pytest.raises(ValueError, match="key layout is not known"):
        KeyLayout.from_permutation(shuffled)
    nearly = KeyLayout(32, 64, 16, 2).offsets()
    nearly[[3, 4], 7] = nearly[[4, 3], 7]
    with pytest.raises(ValueError, match="key layout is not known"):
        KeyLayout.from_permutation(nearly)


@pytest.mark.parametrize(
    ("changes", "line"),
    [({"token_group": 3}, "does not divide page_size"), ({"channel_pack": 5}, "does not divide head_dim")],
)
def test_impossible_layouts_are_refused(changes: dict[str, int], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        KeyLayout(**{"page_size": 32, "head_dim": 64, "token_group": 1, "channel_pack": 1} | changes)


def test_a_writer_that_rounds_or_loses_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="as a permutation"):
        probe_permutation(lambda keys: torch.zeros(32 * 64), 32, 64, 2, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(("page", "dim"), [(32, 64), (128, 128), (128, 256)])
def test_the_probe_reads_off_any_layout(page: int, dim: int, stored: torch.dtype) -> None:
    layout = KeyLayout(page, dim, 16, 2)

    def write(keys: torch.Tensor) -> torch.Tensor:
        return layout.from_logical(keys[:, -1].to(stored))

    found = probe_permutation(write, page, dim, 2, torch.bfloat16, stored)
    assert KeyLayout.from_permutation(found) == layout


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize(
    ("dtype", "stored", "cache_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, "auto"),
        (torch.float32, torch.float32, "auto"),
        (torch.bfloat16, torch.float8_e4m3fn, "fp8_e4m3"),
        (torch.float32, torch.float8_e5m2, "fp8_e5m2"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("page", "dim"), [(128, 64), (32, 80), (128, 128)])
def test_the_probe_reads_off_the_real_engine(
    dtype: torch.dtype, stored: torch.dtype, cache_dtype: str, page: int, dim: int
) -> None:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    if stored.itemsize == 1 and dim % 32:
        pytest.skip("vLLM stores heads of this size with 16 bits or more")
    if stored.itemsize == 1 and not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("vLLM stores keys of 8 bits where there is AVX-512 or AMX alone")
    isa = _get_attn_isa(dtype, page, dim)
    heads, key_scale = 3, 0.37 if stored.itemsize == 1 else 1.0
    # What rounding takes from a quotient must not cost a step of the 8-bit type: the engine's writer cuts off.
    written = 1.0 if stored.itemsize > 1 else key_scale * 65 / 64

    def cache_with(keys: torch.Tensor) -> torch.Tensor:
        cache = torch.zeros(1, heads, page, 2 * dim, dtype=torch.uint8 if stored.itemsize == 1 else dtype)
        key_cache, value_cache = cache.view(1, heads, 2 * page, dim).chunk(2, dim=2)
        slots = torch.arange(page)
        ops.cpu_attn_reshape_and_cache(
            keys, keys, key_cache, value_cache, slots, isa, k_scale=key_scale, v_scale=1.0, kv_cache_dtype=cache_dtype
        )
        return cache.view(stored)

    def write(keys: torch.Tensor) -> torch.Tensor:
        return cache_with(keys * written)[0, -1].flatten()[: page * dim]

    layout = KeyLayout.from_permutation(probe_permutation(write, page, dim, heads, dtype, stored))
    if isa.startswith("vec"):
        assert layout == KeyLayout(page, dim, token_group=page, channel_pack=1)
    # What the engine writes is what the search reads.
    keys = torch.randn(page, heads, dim).to(stored).to(dtype)
    read = PagedKeys(cache_with(keys * written), layout, scale=1.0).gather(torch.tensor([0]))
    assert torch.equal(read, keys.double())


@pytest.mark.parametrize(
    ("tensor", "line"),
    [
        (torch.zeros(4, 2, 32, 128, dtype=torch.int8), "int8"),
        (torch.zeros(4, 2, 32, 64), "expected"),
        (torch.zeros(4, 2, 128, 32).transpose(2, 3), "contiguous"),
    ],
)
def test_a_cache_of_another_form_is_refused(tensor: torch.Tensor, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        PagedKeys(tensor, KeyLayout.row_major(32, 64), scale=1.0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"sinks": torch.zeros(6, dtype=torch.bfloat16)}, "float32, one for each query head of 2 KV heads"),
        ({"sinks": torch.zeros(2, 3)}, r"\[2, 3\]"),
        ({"sinks": torch.zeros(5)}, r"\[5\]"),
    ],
)
def test_a_cap_or_sinks_of_another_form_are_refused(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        PagedKeys(torch.zeros(4, 2, 32, 128), KeyLayout.row_major(32, 64), scale=1.0, **changes)  # type: ignore[arg-type]
