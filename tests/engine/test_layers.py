"""What is told of vLLM's attention layers by their names. Layers of real models: tests/e2e/test_attention_kinds.py."""

from types import SimpleNamespace

import pytest

from stream_monitor.engine.compat.layers import attention_layers
from stream_monitor.engine.plan import LayerFacts, layer_refusals

pytest.importorskip("vllm")

LAYERS = 3
"""Of the model; its draft model adds to these."""
OF_MODEL = [f"model.layers.{index}.self_attn.attn" for index in range(LAYERS)]
DRAFT = "belongs to the draft model"


def found(names: list[str], monkeypatch: pytest.MonkeyPatch, speculative: object = "given") -> list[LayerFacts]:
    """Facts of layers of these names, of which vLLM's configuration says no more."""
    from vllm.model_executor.layers import attention_layer_base

    monkeypatch.setattr(attention_layer_base, "AttentionLayerBase", SimpleNamespace)
    config = SimpleNamespace(
        speculative_config=speculative,
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: LAYERS),
        compilation_config=SimpleNamespace(static_forward_context={name: SimpleNamespace() for name in names}),
    )
    return [facts for facts, _ in attention_layers(config)]


@pytest.mark.parametrize(
    "name",
    [
        # EAGLE and its like, numbered on from the model's last.
        "model.layers.3.self_attn.attn",
        "model.eagle_layers.4.self_attn.attn",
        "model.layers.3.mtp_block.self_attn.attn",
        # Multi-token prediction of Qwen3-Next, MiMo V2 and others, numbered anew.
        "mtp.layers.0.self_attn.attn",
        "model.mtp.layers.1.self_attn.attn",
        # A model of its own.
        "draft_model.model.layers.0.self_attn.attn",
    ],
)
def test_layers_of_a_draft_model_are_refused_as_such(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_model, of_draft = [], []
    for facts in found([*OF_MODEL, name], monkeypatch):
        (of_draft if DRAFT in layer_refusals(facts) else of_model).append(facts.name)
    assert (of_model, of_draft) == (OF_MODEL, [name])


def test_without_drafts_a_layer_beyond_the_count_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's configuration need not count all that keeps something of the context."""
    (facts,) = found(["model.layers.3.self_attn.attn"], monkeypatch, speculative=None)
    assert DRAFT not in layer_refusals(facts)
