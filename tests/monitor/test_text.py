"""Sentence text: exactly what the tokenizer makes of all tokens, wherever they are cut."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from stream_monitor.cli import app
from stream_monitor.monitor.text import (
    MISMATCH,
    NO_TOKENIZER,
    NOT_SENT,
    TextError,
    TokenText,
    Vocabularies,
    Vocabulary,
    one_line,
)
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2
from tests.monitor.conftest import Running
from tests.monitor.spoken import Speech, byte_level, packed
from tests.monitor.synthetic import Engine, Look, finished

CHAT = "<|im_start|>user\nHow old is Anna?<|im_end|>\n<|im_start|>assistant\n"
CHAT += "Anna is seven. Ben is a 👩‍🚀 of 中国. So it is."


def sentence_piece(folder: Path) -> Path:
    """A tokenizer of the SentencePiece kind, with bytes for what it does not know, as those of Llama 2 and Gemma."""
    words = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABS.,!?0123456789",
    ]
    tokenizer = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


KINDS = {"byte level": byte_level, "sentence piece": sentence_piece}


@pytest.fixture(scope="module", params=KINDS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("chat"))


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40), st.data())
def test_the_sentences_joined_are_the_whole_text(file: Path, text: str, data: st.DataObject) -> None:
    tokenizer = Tokenizer.from_file(str(file))
    # Behind a letter, since SentencePiece drops a space that begins a text.
    ids = tokenizer.encode("a" + text, add_special_tokens=False).ids
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=6)) | {0, len(ids)})
    held = TokenText(Vocabulary(file))
    for start, end in pairwise(cuts):
        held.put(start, packed(ids[start:end]), b"")
    joined = "".join(held.between(start, end) for start, end in pairwise(cuts))
    assert joined == tokenizer.decode(ids, skip_special_tokens=False)


def test_any_ids_read_as_the_tokenizer_reads_them_byte_by_byte(chat_file: Path) -> None:
    """Also ids that are no text: cut at every place, characters that are never completed included."""
    tokenizer = Tokenizer.from_file(str(chat_file))
    vocabulary = Vocabulary(chat_file)
    draws = np.random.default_rng(7)
    for _ in range(200):
        ids = draws.integers(0, tokenizer.get_vocab_size(), 12).tolist()
        held = TokenText(vocabulary)
        held.put(0, packed(ids), b"")
        assert held.between(0, 12) == tokenizer.decode(ids, skip_special_tokens=False)


def test_a_character_belongs_to_the_sentence_it_begins_in(chat_file: Path) -> None:
    ids = Tokenizer.from_file(str(chat_file)).encode("a€b").ids
    assert len(ids) == 5
    held = TokenText(Vocabulary(chat_file))
    held.put(100, packed(ids), b"")
    assert [held.between(100, end) for end in (101, 102, 103, 104)] == ["a", "a€", "a€", "a€"]
    assert [held.between(start, 105) for start in (101, 102, 103, 104)] == ["€b", "b", "b", "b"]
    assert held.between(102, 104) == ""


def test_what_is_lost_is_marked_and_what_was_replaced_is_gone(chat_file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(chat_file))
    a, b, c = (tokenizer.token_to_id(letter) for letter in "abc")
    held = TokenText(Vocabulary(chat_file))
    taken = held.put(10, packed([a, b]), b"") + held.put(14, packed([c]), b"")
    assert held.between(9, 16) == "\ufffdab\ufffdc\ufffd"
    assert held.between(12, 14) == held.between(0, 5) == ""
    taken += held.put(11, packed([c, c, c, c, c]), b"")
    assert held.between(10, 15) == "abccc", "what is known stays, what was missing is filled"
    taken += held.put(0, packed([a] * 12), b"")
    assert held.between(0, 12) == "a" * 11 + "b"
    taken += held.cut(11)
    assert held.between(0, 100) == "a" * 11 + "\ufffd"
    assert taken + held.cut(0) == 0


def test_an_id_beyond_the_vocabulary_is_marked_and_not_remembered(chat_file: Path) -> None:
    vocabulary = Vocabulary(chat_file)
    held = TokenText(vocabulary)
    held.put(0, packed([2**32 - 1, vocabulary._tokenizer.token_to_id("a")]), b"")
    assert held.between(0, 2) == "\ufffda"
    assert len(vocabulary) == 1


def test_flags_tell_another_model_s_tokenizer(chat_file: Path, model_dir: Path) -> None:
    from transformers import AutoTokenizer

    from stream_monitor.engine.vocabulary import token_flags

    theirs = AutoTokenizer.from_pretrained(model_dir)
    ids = theirs(CHAT)["input_ids"]
    flags = token_flags(theirs, len(theirs))[ids].tobytes()
    right, wrong = TokenText(Vocabulary(model_dir)), TokenText(Vocabulary(chat_file))
    for each in (right, wrong):
        each.put(0, packed(ids), flags)
    assert (right.reason, right.between(0, len(ids))) == ("", CHAT)
    assert (wrong.reason, wrong.between(0, len(ids))) == (MISMATCH, "")
    wrong.put(len(ids), packed(ids), flags)
    assert wrong.reason == MISMATCH


def test_a_tokenizer_by_model(chat_file: Path, tmp_path: Path) -> None:
    other = sentence_piece(tmp_path)
    found = Vocabularies.read(f"org/one={chat_file}, {other.parent}")
    assert found.of("org/one") is not found.of("two") is found.of("three")
    assert Vocabularies.read(f"one={chat_file}").of("two") is None


@pytest.mark.parametrize(
    ("setting", "says"),
    [("{folder}", "cannot read {folder}/tokenizer.json"), ("{bad}", "{bad} is not a tokenizer.json"), ("a=", "neither"),
     ("{good},{good}", "two for all other models")],
)  # fmt: skip
def test_a_bad_setting_is_one_line(setting: str, says: str, chat_file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({"model": {}}))
    names = {"folder": tmp_path, "bad": tmp_path / "bad.json", "good": chat_file}
    with pytest.raises(TextError) as error:
        Vocabularies.read(setting.format(**names))
    assert says.format(**names) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("given", "file"), [("", "tokenizer.json"), ("model", "model")])
def test_a_folder_that_may_not_be_entered_is_one_line(given: str, file: str, closed_folder: Path) -> None:
    with pytest.raises(TextError) as error:
        Vocabularies.read(f"tiny={closed_folder / given}")
    assert str(error.value) == f"tokenizers: cannot read {closed_folder / file}: Permission denied"


def test_without_the_package_the_extra_is_named(chat_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(TextError, match=r"pip install 'stream-monitor\[text\]'"):
        Vocabulary(chat_file)


def test_a_terminal_is_given_nothing_to_obey() -> None:
    assert one_line("a\x1b[2J  b\n c", 9) == "a\ufffd[2J b c"
    assert one_line("abcdef", 4) == "abc…"


# The whole monitor


def talk(monitor: Running, file: Path, name: str, with_ids: bool = True) -> monitor_pb2.GetTraceResponse:
    """CHAT as one request."""
    prompt, said = CHAT[: CHAT.index("Anna is seven")], CHAT[CHAT.index("Anna is seven") :]
    speech = Speech(file, name, prompt, with_ids=with_ids)
    monitor.publish([*speech.start(), *speech.say(said), *speech.finish()])
    return monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id=name))


def test_text_is_in_traces_and_events(run: Callable[..., Running], chat_file: Path) -> None:
    monitor = run(tokenizers=f"tiny={chat_file}")
    events = monitor.api.Subscribe(monitor_pb2.SubscribeRequest(kinds=[monitor_pb2.EVENT_KIND_SENTENCE_CLOSED]))
    next(events)
    trace = talk(monitor, chat_file, "chat")
    texts = [sentence.text for sentence in trace.sentences]
    assert "".join(texts) == CHAT
    assert texts[-3:] == ["Anna is seven.", " Ben is a 👩‍🚀 of 中国.", " So it is."]
    assert trace.info.no_text_reason == ""
    assert next(events).event.sentence.text == "Anna is seven."
    explained = CliRunner().invoke(app, ["explain", "chat", "--target", monitor.server.grpc_address])
    assert "Anna" in explained.output
    held = monitor.server.store.get(trace.info.key.engine_instance, "chat")
    assert held is not None
    assert held.bytes > 4 * len(Tokenizer.from_file(str(chat_file)).encode(CHAT).ids)
    events.cancel()


def test_events_hold_the_beginning_of_a_text(run: Callable[..., Running], chat_file: Path) -> None:
    monitor = run(tokenizers=str(chat_file))
    letter = Tokenizer.from_file(str(chat_file)).token_to_id("a")
    engine = Engine()
    flags = bytes(400)
    run_ = summary_pb2.TokenRun(request_id="r", first_position=0, flags=flags, token_ids=packed([letter] * 400))
    monitor.publish([engine.summary([Look("r", 399, 3)], tokens=[run_]), engine.summary(finished=[finished("r", 400)])])
    trace = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="r"))
    assert [sentence.text for sentence in trace.sentences] == ["a" * 400]
    held = next(monitor.server.store.newest_first())
    from stream_monitor.monitor import views

    assert views.sentence(held, 0).text == "a" * 239 + "…"


@pytest.mark.parametrize(("with_ids", "reason"), [(False, NOT_SENT), (True, NO_TOKENIZER)])
def test_without_text_there_are_numbers_and_the_reason(
    run: Callable[..., Running], chat_file: Path, with_ids: bool, reason: str
) -> None:
    monitor = run(tokenizers=f"another={chat_file}")
    trace = talk(monitor, chat_file, "chat", with_ids)
    assert trace.info.no_text_reason == reason
    assert len(trace.sentences) == 4
    assert not any(sentence.text for sentence in trace.sentences)
    assert monitor.metric("stream_monitor_requests_without_text_total", model_name="tiny", reason=reason) == 1


def test_a_subscriber_may_ask_for_the_newest_findings(monitor: Running) -> None:
    for name in "abc":
        monitor.publish(Engine().request(name, [4] * 14 + [30] * 8))
    ids = []
    for response in monitor.api.Subscribe(monitor_pb2.SubscribeRequest(last=2)):
        ids += [response.event.external_id] * response.HasField("event")
        if len(ids) == 2:
            break
    assert ids == ["b", "c"]
    first = next(
        response.event.external_id
        for response in monitor.api.Subscribe(monitor_pb2.SubscribeRequest(last=1, request_ids=["a"]))
        if response.HasField("event")
    )
    assert first == "a"
    with pytest.raises(grpc.RpcError) as refusal:
        next(monitor.api.Subscribe(monitor_pb2.SubscribeRequest(last=1001)))
    assert "at most 1000" in refusal.value.details()
