"""What is loaded, what is refused, and the one line that says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from stream_monitor.tracing import chunks
from stream_monitor.tracing.attention import LayerInputs, dense_attention
from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.model import load, read_messages, read_prompt
from tests.tracing import tiny

GEMMA2 = {
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
    "sliding_window": 70,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 16,
}


@pytest.mark.parametrize(
    ("kind", "changes", "windows"),
    [
        ("llama", {}, (0, 0, 0)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}, (0, 70, 70)),
        ("gemma2", GEMMA2, (70, 0, 70)),
        ("gpt2", {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 2048}, (0, 0, 0)),
    ],
)
def test_hidden_states_and_logits_are_the_models_own(
    kind: str, changes: dict[str, Any], windows: tuple[int, ...], tmp_path: Path
) -> None:
    folder = tiny.save(tmp_path, kind, **changes)
    model = load(str(folder))
    assert (model.windows, model.query_heads, model.limit) == (windows, 4, 2048)
    ids = tiny.tokens(300)
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.inference_mode():
        expected = own(torch.tensor([ids])).logits[0]
    found = model.logits(model.run(ids, dense_attention))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    cache = transformers.DynamicCache()
    model.run(ids[:200], dense_attention, cache)
    last = [model.run([token], dense_attention, cache) for token in ids[200:]]
    torch.testing.assert_close(model.logits(torch.cat(last)), expected[200:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "inner"),
    [("llama", {}, "mlp.down_proj"), ("gpt2", {"n_layer": 3, "n_head": 4, "n_embd": 64}, "mlp.c_proj")],
)
def test_feed_forward_layers_take_a_long_prompt_in_parts(
    kind: str, changes: dict[str, Any], inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(tiny.save(tmp_path, kind, **changes)))
    whole = model.run(tiny.tokens(300), dense_attention)
    taken: list[int] = []
    for name, module in model.decoder.named_modules():
        if name.endswith(inner):
            module.register_forward_hook(lambda _, args, out: taken.append(out.shape[1]))
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 128)
    torch.testing.assert_close(model.run(tiny.tokens(300), dense_attention), whole, atol=1e-5, rtol=1e-5)
    assert taken == 3 * [128, 128, 44]


def test_what_is_more_than_one_tensor_is_not_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 2)

    class Routed(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, int]:
            return 2 * hidden, hidden.shape[1]

    layer = torch.nn.ModuleDict({"mlp": Routed()})
    chunks.chunk_feed_forward(layer)
    out, tokens = layer["mlp"](torch.ones(1, 5, 3))
    assert tokens == 5
    assert (out == 2).all()


def test_linear_layers_in_half_precision_leave_all_else_in_float32(tmp_path: Path) -> None:
    folder = str(tiny.save(tmp_path, initializer_range=0.1))
    seen: set[torch.dtype] = set()

    def attend(inputs: LayerInputs) -> torch.Tensor:
        seen.update(x.dtype for x in (inputs.queries, inputs.keys, inputs.values))
        out = dense_attention(inputs)
        seen.add(out.dtype)
        return out

    single, half = load(folder), load(folder, linear=torch.bfloat16)
    ids = tiny.tokens(200)
    hidden = half.run(ids, attend)
    assert seen | {hidden.dtype, half.logits(hidden).dtype} == {torch.float32}
    expected = single.run(ids, dense_attention)
    error = (hidden - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("bert", {}, "not a decoder: layer 0 sees later tokens too"),
        ("bloom", {"n_layer": 3, "n_head": 4}, "attention of layers 0 to 2 does not go through"),
        ("mamba", {}, "attention of layers 0 to 2 does not go through|cannot be traced: linear_attention"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "learned attention sinks"),
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 64}, "cannot be traced: chunked_attention"),
        ("cohere", {"logit_scale": 0.5, "pad_token_id": None}, "attention or logits hold more than is known here"),
    ],
)
def test_what_cannot_be_traced_is_refused(kind: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, kind, **changes)
    with pytest.raises(TracingError, match=reason):
        load(str(folder))


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(TracingError, match="is not a decoder: its type is t5"):
        load(str(tmp_path))


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_is_refused(damage: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    (folder / damage).write_bytes(b"{nothing of use")
    with pytest.raises(TracingError, match=r"cannot (load|read)"):
        load(str(folder))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TracingError, match=r"it has no config\.json"):
        load(str(tmp_path))


def test_prompts_become_tokens_or_are_refused(tmp_path: Path) -> None:
    model = load(str(tiny.save(tmp_path, max_position_embeddings=64)))
    assert model.tokenizer.decode(model.prompt_tokens("Hello!")) == "Hello!"
    chat = model.chat_tokens([{"role": "user", "content": "Hi"}])
    assert model.tokenizer.decode(chat) == "[user]Hi[assistant]"
    assert len(model.prompt_tokens("a" * 64)) == 64
    with pytest.raises(TracingError, match=r"has 65 tokens; .* is made for 64 at most"):
        model.prompt_tokens("a" * 65)
    with pytest.raises(TracingError, match="made for 64 at most"):
        model.chat_tokens([{"role": "user", "content": "a" * 60}])
    with pytest.raises(TracingError, match="the prompt is empty"):
        model.prompt_tokens(" \n")
    with pytest.raises(TracingError, match="there are no messages"):
        model.chat_tokens([])
    model.tokenizer.chat_template = None
    with pytest.raises(TracingError, match="chat template"):
        model.chat_tokens([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("content", ["{", '{"role": "user"}', '[{"role": "user"}]', '[{"role": "user", "content": 3}]'])
def test_what_is_not_a_list_of_messages_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    path.write_text(content)
    with pytest.raises(TracingError, match=r"messages\.json is not"):
        read_messages(path)


def test_files_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_text(json.dumps([{"role": "user", "content": "ü"}]), encoding="utf-8")
    assert read_messages(path) == [{"role": "user", "content": "ü"}]
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(TracingError, match="not text in UTF-8"):
        read_prompt(path)
    with pytest.raises(TracingError, match=r"cannot read .*: Is a directory"):
        read_prompt(tmp_path)
