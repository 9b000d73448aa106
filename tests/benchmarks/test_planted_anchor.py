"""The prompts of `benchmarks.planted_anchor`, and what it takes for the notes that an answer rests on."""

import re
from collections import Counter

import numpy as np
import pytest

from benchmarks.planted_anchor import NOTES, TOP, heaviest, plant
from benchmarks.replay import Replay
from stream_monitor.config import CaptureSettings
from stream_monitor.monitor import views
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


def test_the_notes_named_are_those_that_the_rows_of_the_answer_read_most(model: TracedModel) -> None:
    planted = plant(model, 1, 0.5)
    settings = CaptureSettings(strategy="exact", stride=1, layers="all")
    trace = Replay(model, settings).run(planted.ids, planted.prompt_tokens)
    told = views.full(trace)
    reads, read = (np.frombuffer(raw, "<u4") for raw in (told.matrix_row, told.matrix_column))
    captured = np.frombuffer(told.captured_rows, "<u4")
    mass: Counter[str] = Counter()
    for row, column, share in zip(reads, read, np.frombuffer(told.matrix_share, "<f4"), strict=True):
        span = told.sentences[column]
        text = model.tokenizer.decode(planted.ids[span.first_token : span.end_token])
        note = re.search(r"\w+ from the \w+ counted \d+ \w+ that day\.", text)
        if note and told.sentences[row].first_token >= planted.prompt_tokens > span.first_token:
            mass[note.group()] += captured[row] * share
    assert len(mass) > TOP
    assert heaviest(model, planted, trace) == [note for note, _ in mass.most_common(TOP)]
