"""Greedy decoding against transformers' own."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import transformers

from stream_kernels.search import SearchConfig
from stream_monitor.tracing.attention import LayerInputs, dense_attention
from stream_monitor.tracing.generation import RestrictedAttention, generate, greedy, repeated, stop_tokens
from stream_monitor.tracing.layer import TraceOptions
from stream_monitor.tracing.model import TracedModel
from tests.tracing import tiny

IDS = tiny.tokens(300, seed=3)


def by_transformers(model: TracedModel, tokens: int, stop: int | None = None) -> list[int]:
    own = transformers.AutoModelForCausalLM.from_pretrained(model.name, attn_implementation="eager")
    own.generation_config.eos_token_id = stop
    found = own.generate(torch.tensor([IDS]), max_new_tokens=tokens, do_sample=False)
    return found[0, len(IDS) :].tolist()


@pytest.mark.parametrize("kept", [None, 64])
def test_unrestricted_it_decodes_as_transformers_does(tiny_model: TracedModel, kept: int | None) -> None:
    read = decode = dense_attention
    if kept:  # more blocks than there are
        search = SearchConfig(strategy="exact", block_size=8, top_k=kept)
        read, decode = (restricted := RestrictedAttention(TraceOptions(search))).read, restricted.decode
    assert generate(tiny_model, IDS, read, decode, 16, ()) == by_transformers(tiny_model, 16)


def test_it_stops_before_the_token_that_ends_an_answer(tiny_model: TracedModel) -> None:
    whole = by_transformers(tiny_model, 16)
    stop = whole[9]
    found = generate(tiny_model, IDS, dense_attention, dense_attention, 16, {stop})
    assert [*found, stop] == by_transformers(tiny_model, 16, stop)


def test_a_token_costs_a_pass_only_when_it_is_asked_for(tiny_model: TracedModel) -> None:
    queries: list[int] = []

    def attend(inputs: LayerInputs) -> torch.Tensor:
        queries.append(len(inputs.queries))
        return dense_attention(inputs)

    hidden, following = greedy(tiny_model, IDS, attend, attend)
    assert len(hidden) == len(IDS)
    assert len(list(islice(following, 3))) == 3
    assert queries[:: tiny_model.layers] == [len(IDS), 1, 1]


def test_the_restricted_count_the_context_alone(tiny_model: TracedModel) -> None:
    restricted = RestrictedAttention(TraceOptions(SearchConfig(strategy="exact", block_size=8, top_k=1)))
    generate(tiny_model, IDS, restricted.read, restricted.decode, 4, ())
    blocks = -(-len(IDS) // 8)
    pairs = tiny_model.layers * tiny_model.query_heads
    assert restricted.pairs.causal == pairs * blocks * (blocks + 1) // 2
    # A sink, two recent ones and one more; the first three blocks of queries have fewer before them.
    assert restricted.pairs.kept == pairs * (4 * blocks - 3 - 2 - 1)
    assert len(restricted.keys_read) == tiny_model.layers


@pytest.mark.parametrize(("settings", "stop"), [(None, {5}), (7, {5, 7}), ([7, 9], {5, 7, 9})])
def test_answers_end_where_the_model_or_its_tokenizer_says(
    tiny_model: TracedModel, settings: int | list[int] | None, stop: set[int]
) -> None:
    decoder = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=settings))
    model = replace(tiny_model, decoder=decoder, tokenizer=SimpleNamespace(eos_token_id=5))
    assert stop_tokens(model) == stop
    assert stop_tokens(replace(model, tokenizer=SimpleNamespace(eos_token_id=None))) == stop - {5}


@pytest.mark.parametrize("name", ["tiny_model", "windowed_model"])
def test_one_pass_over_given_tokens_is_as_decoding_them_in_turn(name: str, request: pytest.FixtureRequest) -> None:
    model: TracedModel = request.getfixturevalue(name)
    restricted = RestrictedAttention(TraceOptions(SearchConfig(strategy="exact", block_size=8, top_k=1)))
    hidden, following = greedy(model, IDS, restricted.read, restricted.decode)
    own = list(islice(following, 12))
    for given, same in ((own, 12), ([*own[:7], own[7] ^ 1, *own[8:]], 7), ([own[0] ^ 1], 0), ([], 0)):
        again, found = repeated(model, IDS, restricted.read, restricted.decode, given)
        assert found == same
        torch.testing.assert_close(again, hidden)
