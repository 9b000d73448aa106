"""The prompts of `benchmarks.planted_anchor`."""

import re

import pytest

from benchmarks.planted_anchor import NOTES, plant
from stream_monitor.tracing.model import TracedModel, load
from tests.tracing import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TracedModel:
    folder = tmp_path_factory.mktemp("tiny")
    return load(str(tiny.save(folder, max_position_embeddings=8192)))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_one_note_answers_the_question_and_is_the_answer(model: TracedModel, depth: float) -> None:
    planted = plant(model, 3, depth)
    prompt = model.tokenizer.decode(planted.ids[: planted.prompt_tokens])
    notes = re.findall(r"\w+ from the \w+ counted \d+ \w+ that day\.", prompt)
    assert len(notes) == len(set(notes)) == NOTES >= 40
    assert notes.index(planted.note) == round(depth * (NOTES - 1))
    assert model.tokenizer.decode(planted.ids[planted.prompt_tokens :]) == planted.note
    (thing, person, place) = re.findall(r"How many (\w+) did (\w+) from the (\w+) count\?", prompt)[0]
    answering = [note for note in notes if note.startswith(f"{person} from the {place} counted")]
    assert answering == [planted.note]
    assert thing in planted.note


def test_prompts_depend_on_the_seed_alone(model: TracedModel) -> None:
    assert plant(model, 1, 0.5).ids == plant(model, 1, 0.5).ids
    assert plant(model, 1, 0.5).ids != plant(model, 2, 0.5).ids
