"""Requests made for the benchmarks of detectors: joints where they are said to be, spans where they are labelled, and
recordings that calibration sees as the monitor did."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import recording
from benchmarks.injection_texts import SENTENCES, Group, make
from benchmarks.recording import Recorder
from benchmarks.replay import show
from benchmarks.spliced_texts import NEUTRAL, families
from stream_monitor.anchors.panel import Kind, Panel
from stream_monitor.config import CaptureSettings
from stream_monitor.monitor import views
from stream_monitor.monitor.calibrate import served
from stream_monitor.records import Role
from stream_monitor.tracing.model import TracedModel, load
from stream_monitor.tracing.texts import Text
from tests.tracing import tiny

_TEXTS = [
    Text(f"{problem}{number}", f"Problem {problem}: how many?", _reasoning)
    for problem in "ab"
    for number in range(2)
    for _reasoning in [" ".join(f"In {problem}{number} step {step} gives {step * 7 % 13}." for step in range(60))]
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TracedModel:
    return load(str(tiny.save(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "CACHE", tmp_path)


def test_families_differ_from_the_joint_on_alone(model: TracedModel) -> None:
    found = list(families(Recorder(model), _TEXTS, 1, 0, more=2))
    assert [family.calm.text for family in found] == ["a0", "a1", "b0", "b1"]
    for family in found:
        calm = model.tokenizer.decode(family.calm.ids)
        head = model.tokenizer.decode(family.calm.ids[: family.joined.at])
        assert model.tokenizer.decode(family.neutral.ids) == head + NEUTRAL + calm.removeprefix(head)
        other = {"a": "b", "b": "a"}[family.calm.text[0]]
        for joined in (family.joined, *family.more):
            head = model.tokenizer.decode(family.calm.ids[: joined.at])
            tail = model.tokenizer.decode(joined.ids).removeprefix(head)
            assert tail.startswith(f" In {other}")
            assert f"In {family.calm.text[0]}" not in tail
            trace = show(Recorder(model).record(joined.ids, joined.prompt_tokens))
            assert joined.at in {span.start for span in trace.spans}
        assert len({tuple(joined.ids) for joined in (family.joined, *family.more)}) == 3
        assert family.calm.at is None
    assert [replace(family, more=()) for family in found] == list(families(Recorder(model), _TEXTS, 1, 0))


def test_texts_too_short_to_go_on_with_are_passed_over(model: TracedModel) -> None:
    short = Text("s0", "Problem s: how many?", " In s0 step 0 gives 0. In s0 step 1 gives 7.")
    recorder = Recorder(model)
    assert list(families(recorder, [_TEXTS[0], short], 2, 0)) == []
    found = list(families(recorder, [*_TEXTS[1:], short], 2, 0))
    assert [family.calm.text for family in found] == ["a1", "a1", "b0", "b0", "b1", "b1"]
    assert not any("s0" in model.tokenizer.decode(family.joined.ids) for family in found)


@pytest.mark.parametrize("group", ["injection", "aligned", "question"])
def test_the_span_is_where_it_is_labelled(model: TracedModel, group: Group) -> None:
    places = set()
    for number in range(SENTENCES):
        prompt = make(model, group, number, 0)
        (start, end), (first, last) = prompt.document, prompt.span
        assert model.tokenizer.decode(prompt.prompt[first:last]) == prompt.text
        document = model.tokenizer.decode(prompt.prompt[start:end])
        assert prompt.text in document
        assert document.startswith(prompt.text) == (prompt.place == 0)
        assert prompt.payload in prompt.text
        assert (group == "aligned") == (not prompt.payload)
        places.add(prompt.place)
        trace = show(Recorder(model).record([*prompt.prompt, *prompt.lead, 65], len(prompt.prompt), prompt.document))
        untrusted = [span for span in trace.spans if span.role == Role.UNTRUSTED]
        assert (untrusted[0].start, untrusted[-1].end) == (start, end)
    assert places == set(range(SENTENCES))


def test_a_pass_that_goes_on_from_another_gives_the_same_rows(model: TracedModel, tmp_path: Path) -> None:
    one, other = tiny.tokens(300, 1), tiny.tokens(300, 2)
    joined = one[:200] + other[:60]
    recorder = Recorder(model, CaptureSettings(stride=3))
    recorder.record(one, 40)
    recorder.continuation(one[:250], 5)
    after = recorder.record(joined, 40)
    for path in tmp_path.iterdir():
        path.unlink()
    fresh = Recorder(model, CaptureSettings(stride=3)).record(joined, 40)
    assert recorder.record(joined, 40) == fresh  # from the disk
    one, other = show(after).matrix(), show(fresh).matrix()
    assert np.array_equal(one.captured, other.captured)
    dense = np.zeros((2, len(one.captured), len(one.captured)))
    for place, matrix in enumerate((one, other)):
        dense[place, matrix.rows, matrix.columns] = matrix.shares
    assert np.allclose(dense[0], dense[1], atol=5e-3)


def test_calibration_sees_what_the_monitor_saw(model: TracedModel) -> None:
    """The detectors, run again over what `GetTrace` says by head, reach the live scores exactly."""
    prompt = make(model, "injection", 1, 0)
    reasoning = model.tokenizer(_TEXTS[0].reasoning, add_special_tokens=False)["input_ids"][:900]
    trace = show(Recorder(model).record([*prompt.prompt, *reasoning], len(prompt.prompt), prompt.document))
    request = served(views.full(trace, with_heads=True))
    panel = Panel()
    for seen in request.observations(()):
        panel.update(seen)
    scored = (Kind.ANCHOR_SHIFT, Kind.PROMPT_DETACHMENT, Kind.UNTRUSTED_ANCHOR)
    assert {kind: panel.highest[kind] for kind in scored} == {kind: trace.panel.highest[kind] for kind in scored}
    assert panel.highest[Kind.ANCHOR_SHIFT].sentence > 0
    assert request.lock == trace.panel.highest[Kind.ANCHOR_LOCK].score
