"""What the taps keep of a forward pass: the last query rows of each request, whichever way they are copied."""

import pytest
import torch

from stream_monitor.engine.cpu.slots import CpuSlot, LayerTap

HEADS, DIM = 2, 4


@pytest.mark.parametrize("tokens", [[1, 1, 1], [1], [3, 1, 2], [1, 5]])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("decode_query_len", [1, 2])
def test_the_last_rows_of_each_request_are_kept(tokens: list[int], padding: int, decode_query_len: int) -> None:
    taps = [LayerTap(0), LayerTap(1)]
    slot = CpuSlot(taps, 4 * decode_query_len, HEADS, DIM, [1], torch.float32, decode_query_len)
    slot.open()
    start_loc = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = start_loc[1:].tolist()
    for layer, tap in enumerate(taps):
        # A part of a wider projection, as models hand it over.
        query = torch.randn(sum(tokens) + padding, HEADS, 3 * DIM)[..., :DIM]
        tap.take(query, start_loc)
        assert not tap.fault
        last = [range(end - min(decode_query_len, own), end) for end, own in zip(ends, tokens, strict=True)]
        for request, rows in enumerate(last):
            end = (request + 1) * decode_query_len
            assert torch.equal(slot.queries[layer, end - len(rows) : end], query[list(rows)])
    assert slot.taken.tolist() == [decode_query_len * len(tokens)] * 2
