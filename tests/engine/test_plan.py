"""The plan names every reason and never watches a layer it cannot read."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from stream_monitor.config import CaptureSettings, SettingsError
from stream_monitor.engine.plan import LayerFacts, layer_refusals, make_plan, target_refusals


def facts(index: int, **changes: object) -> LayerFacts:
    base = LayerFacts(
        name=f"model.layers.{index}.self_attn.attn",
        index=index,
        kind="Attention",
        implementation="StreamCPUAttentionImpl",
        query_heads=9,
        kv_heads=3,
        head_dim=64,
        scale=0.125,
        tapped=True,
        quantised_caches=("fp8",),
    )
    return replace(base, **changes)


def plan(model: list[LayerFacts], *refusals: str, **settings: object):
    return make_plan(model, refusals, CaptureSettings(**settings))


def test_auto_watches_the_upper_two_thirds_within_the_head_budget():
    chosen = plan([facts(i) for i in range(30)]).watched
    assert [p.facts.index for p in chosen] == [13, 20, 26]
    assert all(p.query_heads == tuple(range(9)) for p in chosen)


def test_a_wide_layer_is_watched_at_evenly_spread_heads():
    chosen = plan([facts(i, query_heads=64, kv_heads=8) for i in range(36)]).watched
    assert len(chosen) == 1
    assert chosen[0].query_heads == tuple(range(0, 64, 2))


def test_lists_and_all():
    layers = [facts(i) for i in range(6)]
    assert [p.facts.index for p in plan(layers, layers="0,2-3").watched] == [0, 2, 3]
    assert len(plan(layers, layers="all", heads="0,8").watched) == 6
    assert plan(layers, heads="0,8").watched[0].query_heads == (0, 8)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": "6"}, "layers: 6 does not exist; valid: 0-5"),
        ({"layers": "a"}, "layers: 'a' is neither auto, all nor a list"),
        ({"layers": "²"}, "layers: '²' is neither auto, all nor a list"),
        ({"layers": "8,23-20"}, "layers: 23-20 is empty; the smaller number comes first"),
        ({"heads": "7-0"}, "heads: 7-0 is empty; the smaller number comes first"),
        ({"heads": "9"}, "heads: 9 does not exist; valid: 0-8"),
    ],
)
def test_a_wrong_choice_is_named_with_what_is_valid(settings, says):
    with pytest.raises(SettingsError, match=says.replace("(", r"\(")):
        plan([facts(i) for i in range(6)], **settings)


REFUSED = pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "MLAAttention"}, "latent attention"),
        ({"kind": "MambaMixer2"}, "MambaMixer2 is not softmax attention"),
        ({"tapped": False, "implementation": "X"}, "X has no Stream Monitor subclass"),
        ({"attention_type": "encoder_only"}, "encoder_only attention"),
        ({"sliding_window": 512}, "sliding window of 512"),
        ({"alibi": True}, "ALiBi"),
        ({"shares_kv_with": "layer 3"}, "shares the KV cache of layer 3"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "KV cache of type int8_per_token_head"),
        ({"kv_cache_dtype": "fp8", "quantised_caches": (), "varying_scales": True}, "KV cache of type fp8"),
        ({"kv_cache_dtype": "fp8", "varying_scales": True}, "whose scales differ from head to head"),
        ({"head_dim": 576}, "head size 576 above 512"),
        ({"draft": True}, "draft model"),
    ],
)


@REFUSED
def test_every_kind_of_unreadable_layer_is_refused_with_its_reason(changes, reason):
    assert layer_refusals(facts(0)) == ()
    assert any(reason in refusal for refusal in layer_refusals(facts(0, **changes)))
    mixed = plan([facts(0), facts(1, **changes), facts(2)], layers="all")
    assert [p.facts.index for p in mixed.watched] == [0, 2]
    assert any(reason in line and line.startswith("layers 1:") for line in mixed.reasons)


@REFUSED
def test_the_page_of_coverage_has_every_reason(changes, reason):
    page = (Path(__file__).resolve().parents[2] / "docs" / "coverage.md").read_text()
    # What varies from model to model is N on the page: numbers, names of classes, types and layers.
    shown = [re.escape(part) for part in re.findall(r"`([^`]+)`", page)]
    patterns = [re.sub(r"\bN\b|LAYER|MambaMixer2?", ".+", part) for part in shown]
    for refusal in layer_refusals(facts(0, **changes)):
        assert any(re.fullmatch(pattern, refusal) for pattern in patterns), refusal


def test_a_refused_layer_beside_a_watched_one_of_the_same_index_stays_refused():
    mixer = facts(1, name="model.layers.1.mamba", kind="MambaMixer2", query_heads=0, kv_heads=0, head_dim=0)
    both = plan([facts(0), facts(1), mixer], layers="all")
    assert [p.facts.name for p in both.watched] == [facts(i).name for i in (0, 1)]


def test_all_reasons_of_a_layer_are_collected():
    assert len(layer_refusals(facts(0, sliding_window=8, draft=True, alibi=True))) == 3


def test_an_engine_refusal_leaves_nothing_watched():
    refused = plan([facts(0)], "speculative decoding is not supported by this release")
    assert refused.watched == ()
    assert refused.reasons == ("speculative decoding is not supported by this release",)


def test_layers_of_another_shape_than_most_are_refused():
    chosen = plan([facts(0), facts(1), facts(2, head_dim=128)], layers="all")
    assert [p.facts.index for p in chosen.watched] == [0, 1]
    assert "differ" in chosen.reasons[0]
    assert [p.facts.index for p in plan([facts(0, kv_cache_dtype="fp8")], layers="all").watched] == [0]
    mixed = [facts(i, kv_cache_dtype="auto" if i == 1 else "fp8") for i in range(4)]
    assert [p.facts.index for p in plan(mixed, layers="all").watched] == [0, 2, 3]


def test_a_model_without_attention_says_so():
    assert plan([]).reasons == ("the model has no attention layer on this rank",)


def test_a_pipeline_rank_watches_its_part_of_what_is_chosen_of_the_whole_model():
    whole = [facts(i) for i in range(30)]
    halves = [make_plan(part, (), CaptureSettings(), 30) for part in (whole[:15], whole[15:])]
    assert all(10 <= p.facts.index < 30 for half in halves for p in half.watched)
    listed = [make_plan(part, (), CaptureSettings(layers="3,20-22"), 30) for part in (whole[:15], whole[15:])]
    assert [[p.facts.index for p in half.watched] for half in listed] == [[3], [20, 21, 22]]
    with pytest.raises(SettingsError, match="layers: 30 does not exist; valid: 0-29"):
        make_plan(whole[:15], (), CaptureSettings(layers="30"), 30)


def test_a_pipeline_rank_without_a_layer_to_watch_stands_by():
    first = [facts(i) for i in range(7)]
    assert make_plan(first, (), CaptureSettings(), 30).bystander
    assert make_plan([], (), CaptureSettings(), 30).bystander
    assert not make_plan(first, ("a reason",), CaptureSettings(), 30).bystander
    assert not make_plan([], (), CaptureSettings()).bystander


@pytest.mark.parametrize(
    "target", ["unix:/run/x.sock", "127.0.0.1:9750", "localhost:9750", "[::1]:9750", "127.9.9.9:1"]
)
def test_ranks_on_several_hosts_need_a_target_that_all_of_them_reach(target):
    (reason,) = target_refusals(2, target)
    assert reason.startswith(f"the engine's ranks run on 2 hosts and target {target} is each host's own: set STREAM_")
    assert target_refusals(1, target) == ()
    assert target_refusals(2, "monitor.example:9750") == target_refusals(2, "[fd00::7]:9750") == ()
