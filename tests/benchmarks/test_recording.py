"""A recorded text is cut into the sentences that the engine would have told of."""

from pathlib import Path

import pytest

from benchmarks import recording
from stream_monitor.records import TokenFlag
from stream_monitor.tracing.model import load
from stream_monitor.v1alpha1 import ingest_pb2
from tests.tracing import tiny

PROMPT = "Sum $$a. b$$ up. "
OUTPUT = r"Let us see. \[ x = 1. y = 2 \] So it is. And that is all there is to say."


def test_a_full_stop_in_display_math_ends_no_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "CACHE", tmp_path / "cache")
    model = load(str(tiny.save(tmp_path / "model")))
    ids = model.tokenizer(PROMPT + OUTPUT)["input_ids"]
    assert len(ids) == len(PROMPT + OUTPUT)  # a token a letter
    summaries = [
        ingest_pb2.PublishRequest.FromString(raw).summary for raw in recording.Recorder(model).record(ids, len(PROMPT))
    ]
    flags = summaries[0].started[0].prompt_flags + b"".join(run.flags for each in summaries for run in each.tokens)
    ends = [place for place, flag in enumerate(flags) if flag & TokenFlag.ENDS_TERMINATOR]
    stops = [place for place, letter in enumerate(PROMPT + OUTPUT) if letter == "."]
    assert ends == [place for place in stops if (PROMPT + OUTPUT)[place - 1] not in "a1"]
