"""Sentence ends that no single token shows, with the tokenizers of real models.

SmolLM2's is always there. The environment variable QWEN05 may name the folder of a Qwen2.5 model, whose tokens hold
more: brackets with line ends, every full stop whole.
"""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stream_monitor.anchors.sentences import SentenceBuilder
from stream_monitor.engine.marks import Marks, Reading
from stream_monitor.engine.vocabulary import token_flags
from stream_monitor.records import TokenFlag
from tests.engine.test_requests import new, table

ENDS = TokenFlag.ENDS_TERMINATOR | TokenFlag.BREAKS_INSIDE


class Model:
    """A tokenizer and what the engine makes of it at load."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.flags = token_flags(self.tokenizer, len(self.tokenizer))
        self.marks = Marks.from_tokenizer(self.tokenizer)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def revised(self, ids: Sequence[int], sizes: Sequence[int] = ()) -> bytes:
        """The flags of these tokens, which come in runs of these sizes, then all at once."""
        reading, found = Reading(), b""
        for size in [*sizes, len(ids)]:
            some = ids[len(found) : len(found) + size]
            found += self.marks.revise(reading, some, self.flags[some].tobytes())
        return found

    def sentences(self, text: str, marks: bool = True) -> list[str]:
        """Of an output that is this text, as the monitor cuts it."""
        ids = self.ids(text)
        requests = table(token_flags=self.flags, marks=self.marks if marks else None)
        requests.start(new(prompt=1))
        builder, spans = SentenceBuilder(1), []
        for place, token in enumerate(ids):
            requests.add_tokens("a", 1 + place, [token])
            for run in requests.take_tokens():
                spans += builder.extend(run.first_position, run.flags)
        spans += builder.finish(1 + len(ids))
        return [self.tokenizer.decode(ids[span.start - 1 : span.end - 1]).strip() for span in spans]


@pytest.fixture(scope="module", params=["SmolLM2", "Qwen2.5"])
def model(request: pytest.FixtureRequest, model_dir: Path) -> Model:
    if request.param == "SmolLM2":
        return Model(model_dir)
    if not (folder := os.environ.get("QWEN05")):
        pytest.skip("a clone has SmolLM2 alone, with which the same is tested; QWEN05 names a folder of Qwen2.5's")
    return Model(Path(folder))


@pytest.mark.parametrize(
    "sentences",
    [
        pytest.param(
            [
                "We solve the two equations below now.",
                "\\[\nx = 1. \\quad y = 2. \\\\[2pt]\nz = 3! \\quad w = 4.\n\\]",
                "Then we add all of them up.",
                "And so on we go.",
            ],
            id="brackets",
        ),
        pytest.param(
            ["The whole sum is $$a = 1. b = 2. c = 3.$$", "So it is six in all.", "Good that it is."], id="dollars"
        ),
        pytest.param(
            ["Let us write $$\na = 1. \nb = 2\n$$ for both of them.", "So it is three in all."], id="on lines"
        ),
        pytest.param(["Put \\\\[2pt] between the two rows.", "Then add the third row."], id="a line's end is no mark"),
        pytest.param(["It is \\$\\$5 in the old shop.", "Then it is less."], id="dollars of a price"),
        pytest.param(["It is $5$ in the old shop.", "Then it is $4$ or less.", "So it falls by one."], id="inline"),
    ],
)
def test_a_full_stop_in_display_math_ends_nothing(model: Model, sentences: list[str]) -> None:
    assert model.sentences(" ".join(sentences).replace(" \\[", "\n\\[").replace("\\] ", "\\]\n")) == sentences


def test_these_texts_are_cut_without(model: Model) -> None:
    cut = model.sentences("The whole sum is $$a = 1. b = 2. c = 3.$$ So it is six in all.", marks=False)
    assert cut[0].endswith("1.")


def test_a_blank_line_ends_what_was_never_closed(model: Model) -> None:
    text = "It is $$ in most of the shops. That is a lot.\n\nHere it goes on for long. And here it ends now."
    assert model.sentences(text) == [
        "It is $$ in most of the shops. That is a lot.",
        "Here it goes on for long.",
        "And here it ends now.",
    ]


def test_a_turn_ends_it_as_well(model: Model) -> None:
    """What the user left open is not open in the answer."""
    user = [*model.ids("What is $$ here?"), model.tokenizer.eos_token_id]
    answer = model.ids("It is the mark of a formula. It comes in pairs.")
    flags = model.revised(user + answer)
    assert flags[len(user) :] == model.flags[answer].tobytes()


@pytest.mark.parametrize("stop", "。？！．｡")
def test_every_full_stop_of_cjk_ends_a_sentence_however_it_is_cut(model: Model, stop: str) -> None:
    sentences = [f"你今天过得好不好{stop}", f"我今天过得非常好{stop}", f"我们一起去公园走走吧{stop}"]
    assert model.sentences("".join(sentences)) == sentences


def test_smollm2_cuts_some_of_them(model_dir: Path) -> None:
    """Else the test above would show nothing."""
    model = Model(model_dir)
    assert len(model.ids("？")) == 2
    assert len(model.sentences("你今天过得好不好？我今天过得非常好？", marks=False)) == 1


def test_runs_of_any_size_are_read_alike_and_nothing_else_is_changed(model: Model) -> None:
    draw = random.Random(0)
    parts = [
        "$$",
        " $$",
        "$",
        "\\[",
        "\\]",
        "\\\\",
        "\\",
        "[",
        "]",
        "。",
        "？",
        "！",
        " so",
        " it.",
        ".",
        "\n",
        "\n\n",
        "é",
    ]
    parts += [".\n", "]\n\n", "中", "€"]
    for _ in range(300):
        ids = model.ids("".join(draw.choices(parts, k=draw.randrange(1, 40))))
        plain, whole = model.flags[ids].tobytes(), model.revised(ids)
        assert model.revised(ids, [draw.randrange(1, 5) for _ in ids]) == whole
        changed = np.frombuffer(plain, np.uint8) ^ np.frombuffer(whole, np.uint8)
        assert not (changed & ~np.uint8(ENDS)).any()


def test_a_prompt_is_read_as_well(model: Model) -> None:
    requests = table(token_flags=model.flags, marks=model.marks)
    prompt = model.ids("The whole sum is $$a = 1. b = 2.")
    request = new(prompt=len(prompt))
    request.prompt_token_ids[:] = prompt
    started = requests.start(request)
    assert started is not None
    assert not any(flag & ENDS for flag in started.prompt_flags)
    requests.add_tokens("a", len(prompt), model.ids(" c = 3. d"))
    (run,) = requests.take_tokens()
    assert not any(flag & ENDS for flag in run.flags), "the output goes on where the prompt ended"


def test_what_was_begun_before_missing_tokens_says_nothing_of_those_behind(model: Model) -> None:
    requests = table(token_flags=model.flags, marks=model.marks)
    requests.start(new(prompt=1))
    begun, behind = model.ids("The sum is $$a = 1. b"), model.ids(" So it is seven. Then")
    requests.add_tokens("a", 1, begun)
    requests.add_tokens("a", 1 + len(begun) + 5, behind)
    before, after = requests.take_tokens()
    assert not any(flag & ENDS for flag in before.flags)
    assert after.flags == model.flags[behind].tobytes()
