"""Reasoning and answer of a Harmony chat, told by the names of its channels."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stream_monitor.anchors.sentences import SentenceBuilder
from stream_monitor.engine.channels import Channels
from stream_monitor.engine.vocabulary import token_flags
from stream_monitor.records import Role, TokenFlag
from tests.engine.test_requests import new, table

WORDS = ["analysis", "commentary", "final", "assistant", "so", "seven", "."]
MARKS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="."))
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def ids_of(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    return [tokenizer.get_vocab()[token] for token in tokens]


@pytest.mark.parametrize("run", [1, 2, 3, 100])
def test_the_analysis_is_reasoning_and_the_final_channel_the_answer(
    tokenizer: PreTrainedTokenizerFast, run: int
) -> None:
    """However few tokens come at a time, and though the mark ends one run and the name begins the next."""
    said = ["so", "seven", "."] * 2
    output = ["<|channel|>", "analysis", "<|message|>", *said, "<|end|>", "<|start|>", "assistant", "<|channel|>"]
    output += ["final", "<|message|>", *said, "<|return|>"]
    sampled = ids_of(tokenizer, *output)
    requests = table(token_flags=token_flags(tokenizer, len(tokenizer)), channels=Channels.from_tokenizer(tokenizer))
    requests.start(new(prompt=4))
    builder = SentenceBuilder(4)
    spans = []
    for first in range(0, len(sampled), run):
        requests.add_tokens("a", 4 + first, sampled[first : first + run])
        for tokens in requests.take_tokens():
            spans += builder.extend(tokens.first_position, tokens.flags)
    spans += builder.finish(4 + len(sampled))
    role = {position: span.role for span in spans for position in range(span.start, span.end)}
    final = 4 + output.index("final")
    assert {role[position] for position in range(5, final + 1)} == {Role.REASONING}
    assert {role[position] for position in range(final + 1, 4 + len(sampled))} == {Role.ANSWER}


def test_a_channel_that_the_prompt_opens_is_known(tokenizer: PreTrainedTokenizerFast) -> None:
    channels = Channels.from_tokenizer(tokenizer)
    requests = table(token_flags=np.zeros(len(tokenizer), np.uint8), channels=channels)
    request = new(prompt=2)
    request.prompt_token_ids[:] = ids_of(tokenizer, "assistant", "<|channel|>")
    requests.start(request)
    requests.add_tokens("a", 2, ids_of(tokenizer, "final"))
    (run,) = requests.take_tokens()
    assert run.flags == bytes([TokenFlag.CLOSES_REASONING])


def test_the_words_alone_mean_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    channels = Channels.from_tokenizer(tokenizer)
    assert channels is not None
    ids = np.array(ids_of(tokenizer, "final", "analysis", "<|message|>", "final"))
    flags = np.zeros(len(ids), np.uint8)
    channels.add_flags(flags, ids, -1)
    assert not flags.any()
    channels.add_flags(flags[:0], ids[:0], channels.mark)


def test_a_tokenizer_without_channels_has_none() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert Channels.from_tokenizer(plain) is None
