"""Token flags and prompt roles, over small tokenizers of each kind, with templates of several habits."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stream_monitor.engine.vocabulary import PromptRoles, overlay_untrusted, token_flags
from stream_monitor.records import Role, TokenFlag

CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a default.<|im_end|>
{% endif %}{% if message['role'] == 'tool' %}<|im_start|>user
<tool_response>
{{ message['content'] }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Llama 2: no tool role, roles must alternate, the system prompt is inside the user's turn, headers are plain text.
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '<s>[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}{% endfor %}"""
# Gemma: refuses a system role, and calls the assistant otherwise.
GEMMA = """{% for message in messages %}
{%- if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
{%- if message['role'] not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}
{{- '<|im_start|>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'
+ message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"""
TEXT = [
    "The quick brown fox jumps over the lazy dog. Is it so? Yes! No.\n\nThen it rests.\n",
    "user assistant system model tool_response [INST] [/INST] <<SYS>> <</SYS>> default",
    'He said "stop." (really.) **Done.** 句子结束。真的吗？是的！ 日本語の文。',
] * 20


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>"), AddedToken("<other>")])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in EXTRA])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)


EXTRA = {
    ".": TokenFlag.ENDS_TERMINATOR,
    '."': TokenFlag.ENDS_TERMINATOR,
    ".**": TokenFlag.ENDS_TERMINATOR,
    "?)": TokenFlag.ENDS_TERMINATOR,
    " dog": TokenFlag.BEGINS_SPACE,
    "dog": 0,
    "3.14": 0,
    "\n": TokenFlag.BEGINS_SPACE | TokenFlag.BEGINS_NEWLINE | TokenFlag.ENDS_NEWLINE,
    "\n\n": TokenFlag.BEGINS_SPACE | TokenFlag.BEGINS_NEWLINE | TokenFlag.ENDS_NEWLINE | TokenFlag.BREAKS_INSIDE,
    " \n": TokenFlag.BEGINS_SPACE | TokenFlag.ENDS_NEWLINE,
    ".\n": TokenFlag.BREAKS_INSIDE | TokenFlag.ENDS_NEWLINE,
    '." So': TokenFlag.BREAKS_INSIDE,
    "。": TokenFlag.ENDS_TERMINATOR | TokenFlag.BREAKS_INSIDE,
    "！”": TokenFlag.ENDS_TERMINATOR | TokenFlag.BREAKS_INSIDE,
    "，": 0,
}
"""Flags of these texts, whatever tokens they are."""


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: '▁' for a space, put before the text; bytes for the rest; the decoder drops the first space."""
    texts = [
        "▁",
        "a",
        "▁dog",
        "dog",
        ".",
        "▁.",
        '."',
        "。",
        "▁[",
        "INST",
        "]",
        "[",
        "/",
        "<<",
        "SYS",
        ">>",
        "</",
        "h",
        "i",
    ]
    vocabulary = [*["<unk>", "<s>", "</s>"], *(f"<0x{byte:02X}>" for byte in range(256)), *texts]
    tokenizer = Tokenizer(
        models.Unigram([(text, -1.0 - 0.001 * place) for place, text in enumerate(vocabulary)], 0, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=LLAMA2
    )


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="module")
def llama2() -> PreTrainedTokenizerFast:
    return sentencepiece()


@pytest.mark.parametrize("text", EXTRA)
def test_flags_of_byte_level_tokens(chatml: PreTrainedTokenizerFast, text: str) -> None:
    flags = token_flags(chatml, len(chatml))
    assert TokenFlag(int(flags[chatml.convert_tokens_to_ids(text)])) == EXTRA[text]


def test_learnt_byte_level_tokens(chatml: PreTrainedTokenizerFast) -> None:
    flags = token_flags(chatml, len(chatml))
    assert flags[chatml.convert_tokens_to_ids("Ġ")] == TokenFlag.BEGINS_SPACE
    assert flags[chatml.convert_tokens_to_ids("Ċ")] == EXTRA["\n"]
    assert flags[chatml.convert_tokens_to_ids("?")] == TokenFlag.ENDS_TERMINATOR
    assert flags[chatml.convert_tokens_to_ids("ã")] == 0  # the first byte of 。 and of much else


def test_special_and_reasoning_tokens(chatml: PreTrainedTokenizerFast) -> None:
    flags = token_flags(chatml, len(chatml))
    found = {text: int(flags[chatml.convert_tokens_to_ids(text)]) for text in ("<|im_end|>", "<think>", "</think>")}
    assert found == {
        "<|im_end|>": TokenFlag.SPECIAL,
        "<think>": TokenFlag.OPENS_REASONING,
        "</think>": TokenFlag.CLOSES_REASONING,
    }
    assert flags[chatml.convert_tokens_to_ids("<other>")] == 0


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("[THINK]", TokenFlag.OPENS_REASONING),
        ("[/THINK]", TokenFlag.CLOSES_REASONING),
        ("◁/think▷", TokenFlag.CLOSES_REASONING),
        ("<seed:think>", TokenFlag.OPENS_REASONING),
        ("<|begin_of_thought|>", TokenFlag.OPENS_REASONING),
        ("<|end_of_thinking|>", TokenFlag.CLOSES_REASONING),
    ],
)
def test_names_of_reasoning_tokens(text: str, flag: TokenFlag) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [text]})
    assert token_flags(tokenizer, len(tokenizer))[tokenizer.convert_tokens_to_ids(text)] == flag | TokenFlag.SPECIAL


def test_flags_of_sentencepiece_and_byte_tokens(llama2: PreTrainedTokenizerFast) -> None:
    flags = token_flags(llama2, 320)
    expected = {
        "▁dog": TokenFlag.BEGINS_SPACE,
        "dog": 0,
        "▁": TokenFlag.BEGINS_SPACE,
        "▁.": TokenFlag.BEGINS_SPACE | TokenFlag.ENDS_TERMINATOR,
        '."': TokenFlag.ENDS_TERMINATOR,
        "。": TokenFlag.ENDS_TERMINATOR | TokenFlag.BREAKS_INSIDE,
        "<0x0A>": EXTRA["\n"],
        "<0x2E>": TokenFlag.ENDS_TERMINATOR,
        "<0xE3>": 0,
        "</s>": TokenFlag.SPECIAL,
        "<unk>": TokenFlag.SPECIAL,
    }
    assert {text: TokenFlag(int(flags[llama2.convert_tokens_to_ids(text)])) for text in expected} == expected
    assert flags.shape == (320,)
    assert not flags[len(llama2) :].any()  # rows of the output layer beyond the tokenizer


def roles_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[str, str]]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts, roles = PromptRoles.from_tokenizer(tokenizer).spans(ids)
    assert (starts.dtype, roles.dtype, starts[0]) == (np.uint32, np.uint8, 0)
    edges = [*starts.tolist(), len(ids)]
    return [
        (Role(int(role)).name, tokenizer.decode(ids[start:end]))
        for start, end, role in zip(edges, edges[1:], roles, strict=False)
    ]


def test_turns_of_a_chat(chatml: PreTrainedTokenizerFast) -> None:
    chat = [
        {"role": "system", "content": "Be good."},
        {"role": "user", "content": "\n\nIs it so?"},
        {"role": "assistant", "content": "The dog."},
        {"role": "tool", "content": "user assistant system"},
        {"role": "user", "content": " No."},
    ]
    text = chatml.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert roles_of(chatml, text) == [
        ("SYSTEM", "<|im_start|>system\nBe good.<|im_end|>\n"),
        ("USER", "<|im_start|>user\n\n\nIs it so?<|im_end|>\n"),
        ("ASSISTANT", "<|im_start|>assistant\nThe dog.<|im_end|>\n"),
        ("UNTRUSTED", "<|im_start|>user\n<tool_response>\nuser assistant system\n</tool_response><|im_end|>\n"),
        ("USER", "<|im_start|>user\n No.<|im_end|>\n"),
        ("ASSISTANT", "<|im_start|>assistant\n"),
    ]


def test_a_default_system_prompt_is_not_the_users(chatml: PreTrainedTokenizerFast) -> None:
    text = chatml.apply_chat_template([{"role": "user", "content": "Yes!"}], tokenize=False)
    assert [role for role, _ in roles_of(chatml, text)] == ["SYSTEM", "USER"]


def test_a_system_prompt_inside_the_users_turn(llama2: PreTrainedTokenizerFast) -> None:
    chat = [
        {"role": "system", "content": "hi dog"},
        {"role": "user", "content": "dog"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "dog dog"},
    ]
    assert [role for role, _ in roles_of(llama2, llama2.apply_chat_template(chat, tokenize=False))] == [
        "SYSTEM",
        "USER",
        "ASSISTANT",
        "USER",
        "ASSISTANT",  # [/INST] at the end: the place where the answer begins
    ]


def test_a_template_without_system_and_tool(chatml: PreTrainedTokenizerFast) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = GEMMA
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert [role for role, _ in roles_of(tokenizer, text)] == ["USER", "ASSISTANT"]
    assert {role for _, role in PromptRoles.from_tokenizer(tokenizer).headers} == {Role.USER, Role.ASSISTANT}


def test_no_template_or_no_turns_is_one_user_span(chatml: PreTrainedTokenizerFast) -> None:
    assert roles_of(chatml, "The dog. Yes!") == [("USER", "The dog. Yes!")]
    tokenizer = byte_level()
    tokenizer.chat_template = None
    assert PromptRoles.from_tokenizer(tokenizer).headers == ()
    assert [role for role, _ in roles_of(tokenizer, "<|im_start|>user\nYes")] == ["USER"]
    starts, roles = PromptRoles.from_tokenizer(chatml).spans([])
    assert (starts.tolist(), roles.tolist()) == ([0], [Role.USER])


def test_untrusted_spans_lie_over_the_roles() -> None:
    starts, roles = np.array([0, 10, 20], np.uint32), np.array([1, 2, 6], np.uint8)
    got = overlay_untrusted(starts, roles, [15, 25, 12, 16, 28, 30], 30)
    assert [part.tolist() for part in got] == [[0, 10, 12, 20, 25, 28], [1, 2, 3, 3, 6, 3]]
    assert (got[0].dtype, got[1].dtype) == (np.uint32, np.uint8)
    assert [part.tolist() for part in overlay_untrusted(starts, roles, [], 30)] == [[0, 10, 20], [1, 2, 6]]
    assert [part.tolist() for part in overlay_untrusted(starts, roles, [0, 30], 30)] == [[0, 10, 20], [3, 3, 3]]


@pytest.mark.parametrize("offsets", [[1], [5, 5], [6, 5], [-1, 3], [0, 31], [0.5, 3], [True, 3], ["0", 3]])
def test_untrusted_spans_that_are_not_spans_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^untrusted span") as error:
        overlay_untrusted(np.zeros(1, np.uint32), np.ones(1, np.uint8), offsets, 30)
    assert "\n" not in str(error.value)
