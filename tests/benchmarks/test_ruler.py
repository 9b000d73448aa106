"""RULER's tasks against their definitions, and what is made of the scores."""

import json
import random
import re
import sys
from collections import Counter
from itertools import pairwise
from math import pi
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import transformers

from benchmarks.report import run
from benchmarks.ruler import __main__ as command
from benchmarks.ruler.tasks import TASKS, Sample, make, score
from tests.tracing import tiny

TOKENS = 4_000
NEEDLE = re.compile(r"Remember this: one of the secret codes of (\S+) is (\S+)\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    """One token per byte."""
    return transformers.AutoTokenizer.from_pretrained(folder)


def made(tokenizer: Any, task: str, tokens: int = TOKENS, seed: int = 0, number: int = 0) -> tuple[Sample, str]:
    sample = make(tokenizer, task, tokens, seed, number)
    return sample, tokenizer.decode(sample.ids)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [3_000, 12_000])
def test_a_prompt_and_its_answer_fill_the_tokens_wanted(tokenizer: Any, task: str, tokens: int) -> None:
    sample, _ = made(tokenizer, task, tokens)
    assert 0.95 * tokens <= len(sample.ids) + sample.budget <= tokens
    assert len(tokenizer(", ".join(sample.references))["input_ids"]) <= sample.budget


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_depends_on_its_seed_and_number(tokenizer: Any, task: str) -> None:
    first, again = made(tokenizer, task)[0], made(tokenizer, task)[0]
    assert first == again
    others = [made(tokenizer, task, number=1)[0], made(tokenizer, task, seed=1)[0]]
    assert len({sample.references for sample in (first, *others)}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_begun_after_the_template_and_stands_in_the_text(tokenizer: Any, task: str) -> None:
    sample, text = made(tokenizer, task)
    asked, _, begun = text.rpartition("[assistant]")
    assert re.fullmatch(r"The [^.]+( is| are|:)", begun)
    assert len(set(sample.references)) == len(sample.references)
    assert all(reference in asked for reference in sample.references)
    assert score(asked, sample.references) == 1


@pytest.mark.parametrize(
    ("task", "keys", "values", "asked", "kind"),
    [
        ("niah_single_1", 1, 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 4, 1, 1, r"\d{7}"),
        ("niah_multivalue", 1, 4, 1, r"\d{7}"),
        ("niah_multiquery", 4, 1, 4, r"\d{7}"),
    ],
)
def test_needles_have_the_keys_and_values_of_the_task(
    tokenizer: Any, task: str, keys: int, values: int, asked: int, kind: str
) -> None:
    sample, text = made(tokenizer, task)
    needles = NEEDLE.findall(text)
    codes: dict[str, set[str]] = {}
    for key, value in needles:
        codes.setdefault(key, set()).add(value)
        assert re.fullmatch(kind, value)
    assert len(needles) == keys * values
    assert [len(some) for some in codes.values()] == [values] * keys
    question = text[NEEDLE.search(text).end() :].rpartition("What ")[2]
    wanted = {key for key in codes if key in question}
    assert len(wanted) == asked
    assert set(sample.references) == set().union(*(codes[key] for key in wanted))


def test_a_haystack_of_needles_holds_nothing_else(tokenizer: Any) -> None:
    sample, text = made(tokenizer, "niah_multikey_2")
    lines = text.split("\n\n")[1].splitlines()
    codes = dict(NEEDLE.fullmatch(line).groups() for line in lines)
    assert len(codes) == len(lines) > 50
    wanted = [key for key in codes if key in text.rpartition("What ")[2]]
    assert [codes[key] for key in wanted] == list(sample.references)


def test_hay_is_repeated_noise_or_prose(tokenizer: Any) -> None:
    lines = made(tokenizer, "niah_single_1", 8_000)[1].split("\n\n")[1].splitlines()
    noise = [line for line in lines if not NEEDLE.fullmatch(line)]
    assert len(noise) == len(lines) - 1 > 100
    assert noise == [noise[number % 5] for number in range(len(noise))]
    prose = made(tokenizer, "niah_single_2", 8_000)[1].split("\n\n")[1]
    source = " ".join(" ".join(topics[name] for name in [*sorted(topics), *sorted(topics)]).split())
    before, after = NEEDLE.split(prose)[::3]
    assert f"{before.strip()} {after.strip()}".strip() in source


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_needles_lie_at_every_depth(tokenizer: Any, task: str) -> None:
    depths = []
    for number in range(16):
        sample, text = made(tokenizer, task, 1_500, number=number)
        at = text.index(sample.references[0])
        depths.append(at / text.index("What "))
        before = text[: text.rindex("Remember", 0, at)].rstrip(" ")
        assert before.endswith((".", "?", "!", "\n"))
    assert [sum(low <= depth < low + 0.25 for depth in depths) > 0 for low in (0, 0.25, 0.5, 0.75)] == [True] * 4


def test_variables_are_found_by_following_them(tokenizer: Any) -> None:
    for number in range(8):
        sample, text = made(tokenizer, "vt", number=number)
        values: dict[str, str] = {}
        for name, given in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", text, re.MULTILINE):
            assert name not in values
            values[name] = given if given.isdigit() else values[given]
        shown, asked = re.findall(r"variables have the value (\d{5}),", text)
        assert [name for name, value in values.items() if value == asked] == list(sample.references)
        example = [name for name, value in values.items() if value == shown]
        assert len(example) == len(sample.references) == 5
        assert f"are: {', '.join(example)}\n" in text
        assert all(re.fullmatch("[A-Z]{5}", name) for name in values)


@pytest.mark.parametrize(("tokens", "often", "seldom"), [(4_000, 6, 1), (15_000, 30, 3)])
def test_common_words_are_the_most_common(tokenizer: Any, tokens: int, often: int, seldom: int) -> None:
    sample, text = made(tokenizer, "cwe", tokens)
    listed = [re.findall(r"(\d+)\. (\w+)", part) for part in text.split("Which 10 ")[:2]]
    for numbered in listed:
        assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    example, words = ([word for _, word in numbered] for numbered in listed)
    counts = Counter(words)
    assert {word for word, times in counts.items() if times == often} == set(sample.references)
    assert len(sample.references) == 10
    assert set(counts.values()) == {often, seldom}
    assert not set(example) & set(words)
    assert set(words[:20]) - set(sample.references), "not shuffled"
    assert not [word for word in counts for common in sample.references if common in word and common != word]
    solved = {word for word, times in Counter(example).items() if times > 1}
    shown = re.search(r"most often are: (.*)", text)
    assert shown
    assert set(shown[1].split(", ")) == solved


def test_coded_words_follow_the_square_of_their_rank(tokenizer: Any) -> None:
    sample, text = made(tokenizer, "fwe")
    words = text.split("\n\n")[1].split()
    ranked = Counter(words).most_common(6)
    assert [word for word, _ in ranked[:4]] == ["...", *sample.references]
    assert all(re.fullmatch("[a-z]{6}", word) for word in set(words) - {"..."})
    counts = [times for _, times in ranked]
    assert all(above > below for above, below in pairwise(counts[:5]))
    expected = [len(words) * 6 / (pi * rank) ** 2 for rank in range(1, 7)]
    assert counts == pytest.approx(expected, rel=0.1, abs=1)


def test_the_smallest_coded_texts_leave_no_doubt() -> None:
    draft = TASKS["fwe"](random.Random(0), 0)
    for size in range(draft.smallest, 300):
        counts = [times for _, times in Counter(draft.text(size).split("\n\n")[1].split()).most_common(5)]
        assert all(above > below for above, below in pairwise(counts)), size


@pytest.mark.parametrize(("task", "tokens"), [("cwe", 1_000), ("niah_single_1", 200), ("vt", 700)])
def test_what_does_not_fit_is_refused(tokenizer: Any, task: str, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{task} does not fit into"):
        make(tokenizer, task, tokens, 0, 0)


def test_a_list_longer_than_its_words_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="cwe has words for"):
        make(tokenizer, "cwe", 150_000, 0, 0)


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("ALPHA, beta and Gamma", 1.0),
        ("alpha alpha", 1 / 3),
        ("the gamma\x00beta", 2 / 3),
        ("al\x1fpha", 0.0),
        ("", 0.0),
    ],
)
def test_a_score_is_the_share_of_references_named(answer: str, share: float) -> None:
    assert score(answer, ("alpha", "Beta", "gamma")) == pytest.approx(share)


def test_the_ratio_is_of_sums() -> None:
    assert command.ratio([0.5, 1.0, 1.0, 1.0, 0.0, 0.0]) == 0.75
    assert command.ratio([1.0, 0.0]) == 0


def started(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """Exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["ruler", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run(command.main)
    return stopped.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "poetry"], "task 'poetry'; valid: niah_single_1, "),
        (["--length", 3_000], "3,000 tokens are beyond this model's 2,048; see --length"),
        (["--length", 200, "--task", "vt"], "vt does not fit into 200 tokens"),
        (["--length", 700, "--task", "niah_single_1", "--samples", 1], "the dense model scores 0 on every task"),
    ],
)
def test_what_cannot_be_measured_gives_one_line(
    folder: Path,
    arguments: list[object],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert started(monkeypatch, "--model", folder, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: Invalid value: {said}")
    assert error.count("\n") == 1


def test_an_unreadable_model_gives_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(monkeypatch, "--model", tmp_path) == 2
    assert "is not the folder of a Hugging Face model" in capsys.readouterr().err


def test_figures_are_of_tasks_lengths_and_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Dense and pruned, prompt by prompt: the tiny model solves nothing itself.
    scores = iter([1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.5])
    monkeypatch.setattr(command, "score", lambda *_: next(scores))
    tasks = ["--task", "niah_single_1", "--task", "fwe"]
    assert started(monkeypatch, "--model", folder, *tasks, "--length", 1_000, "--top-k", 2, "--samples", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    figures = found["figures"]
    assert figures["dense/niah_single_1/1000"] == 1
    assert figures["pruned/niah_single_1/1000"] == 0.75
    assert (figures["dense/fwe/1000"], figures["pruned/fwe/1000"]) == (0, 0.25)
    assert (figures["dense"], figures["pruned"]) == (0.5, 0.5)
    assert figures["ratio"] == figures["ratio/1000"] == 1
    assert 0 < figures["pruned_of_causal"] < 1
    low, high = found["ci"]["ratio"]
    assert low < 1 < high
    assert found["must"] == {"ratio": [">=", 0.95]}
    assert (found["n"], found["config"]["top_k"]) == (4, 2)
    [row] = [line for line in lines if line.startswith("fwe")]
    assert "the dense model solves none" in row
