"""Files of the store, read back by the libraries their readers use."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from stream_monitor.client import Monitor
from stream_monitor.monitor.database import Database
from stream_monitor.monitor.export import ExportError, export
from tests.monitor.conftest import Running
from tests.monitor.synthetic import Engine, engine
from tests.monitor.test_retention import fill
from tests.monitor.test_service import SHIFTING
from tests.monitor.test_store import stored, until

CHAT = "chatcmpl-my-req-1-aee6d49e"


@pytest.fixture
def store(run: Callable[..., Running], tmp_path: Path) -> tuple[Running, Path]:
    """Two requests of two models, one with a finding, in a monitor that runs."""
    path = tmp_path / "store" / "monitor.db"
    monitor = run(store=str(path))
    monitor.publish(Engine().request(CHAT, SHIFTING))
    monitor.publish(Engine(engine(model_name="another")).request("plain-bbbbbbbb", [4] * 4))
    until(lambda: stored(path, "SELECT count(*) FROM requests WHERE state = 2") == [(2,)])
    return monitor, path


def exported(store: Path, out: Path, format: str, **limits: str) -> tuple[list[Any], list[Any]]:
    arguments = {"since": "", "until": "", "model_name": ""} | limits
    said = export(str(store), out, format, **arguments)
    names = ("events", "traces")
    assert {path.name for path in out.iterdir()} == {f"{name}.{format}" for name in names}
    if format == "parquet":
        rows = [pq.read_table(out / f"{name}.parquet").to_pylist() for name in names]
    else:
        rows = [[json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()] for name in names]
    assert said == f"{out}: {len(rows[0])} events, {len(rows[1])} traces"
    return rows[0], rows[1]


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_the_files_hold_what_the_monitor_answers(store: tuple[Running, Path], tmp_path: Path, format: str) -> None:
    monitor, path = store
    events, traces = exported(path, tmp_path / "out", format)
    with Monitor(monitor.server.grpc_address) as client:
        trace = client.get_trace("my-req-1", with_heads=True)
    (event,) = events
    assert (event["request_id"], event["external_id"], event["sequence"]) == (CHAT, "chatcmpl-my-req-1", 1)
    assert (event["kind"], event["summary"]) == ("EVENT_KIND_ANCHOR_SHIFT", trace.events[0].summary)
    assert event["to_anchors"][0]["sentence"]["index"] == 5
    assert event["p_value"] is None
    assert event["score"] == pytest.approx(trace.events[0].score)
    plain, found = sorted(traces, key=lambda row: row["external_id"], reverse=True)
    assert (plain["model_name"], plain["events"]) == ("another", 0)
    assert found["engine_instance"] == trace.info.key.engine_instance
    assert found["state"] == "REQUEST_STATE_FINISHED"
    assert [sentence["end_token"] for sentence in found["sentence_list"]] == [s.end_token for s in trace.sentences]
    assert found["matrix_column"] == trace.matrix.column.tolist()
    assert found["matrix_share"] == pytest.approx(trace.matrix.share.tolist())
    scores = trace.vertical_score.tolist()
    assert [score is None or math.isnan(score) for score in found["vertical_score"]] == [math.isnan(s) for s in scores]
    assert found["vertical_score"][5] == pytest.approx(scores[5])
    assert [head["head"] for head in found["heads"]] == [
        {"layer": one.head.layer, "query_head": one.head.query_head} for one in trace.heads
    ]
    for name in ("row", "column", "head", "share"):
        values = getattr(trace.by_head, name)
        assert len(values) > len(trace.heads) > 1
        assert found[f"head_{'index' if name == 'head' else name}"] == pytest.approx(values.tolist())
    for name in ("receiver_score", "corrected_score"):
        values = getattr(trace, name)
        assert np.isfinite(values).any()
        assert np.array(found[name], np.float32) == pytest.approx(values, nan_ok=True)


def test_large_traces_are_written_a_few_at_a_time(
    store: tuple[Running, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_monitor.monitor.export.BATCH_BYTES", 1)
    _, traces = exported(store[1], tmp_path / "out", "parquet")
    assert len(traces) == pq.ParquetFile(tmp_path / "out" / "traces.parquet").num_row_groups == 2


def test_limits(store: tuple[Running, Path], tmp_path: Path) -> None:
    _, path = store

    def counts(name: str, **limits: str) -> tuple[int, int]:
        events, traces = exported(path, tmp_path / name, "jsonl", **limits)
        return len(events), len(traces)

    assert counts("model", model_name="another") == (0, 1)
    assert counts("past", until="2020-01-01") == (0, 0)
    assert counts("future", since="2999-01-01T00:00+00:00") == (0, 0)
    assert counts("now", since="2020-01-01", until="2999-01-01") == (1, 2)


def test_it_works_without_a_monitor_and_empty_files_have_their_schema(
    store: tuple[Running, Path], tmp_path: Path
) -> None:
    monitor, path = store
    monitor.stop()
    exported(path, tmp_path / "all", "parquet")
    exported(path, tmp_path / "none", "parquet", until="2020-01-01")
    one, other = (pq.read_schema(tmp_path / name / "traces.parquet") for name in ("all", "none"))
    assert one == other


def test_a_failure_leaves_no_file(store: tuple[Running, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = store
    out = tmp_path / "results" / "out"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stream_monitor.monitor.export.JsonLines.write", full)
    with pytest.raises(ExportError, match=f"cannot write {out}: No space left on device"):
        export(str(path), out, "jsonl", "", "", "")
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "xml", "--out", "out"), "--format is 'xml'; valid: parquet, jsonl"),
        (("--format", "jsonl", "--out", "out", "--since", "monday"), "--since is 'monday'; valid: a time such as"),
        (("--format", "jsonl", "--out", "out", "--store", "none.db"), "there is no store at none.db"),
        (("--format", "jsonl", "--out", "out", "--store", ""), "the monitor keeps everything in memory"),
        (("--format", "jsonl", "--out", "taken", "--store", "taken/file"), "taken exists and is not an empty folder"),
        (("--format", "jsonl", "--out", "out", "--store", "taken/file"), "cannot read taken/file (corrupt"),
        (("--format", "jsonl", "--out", "taken/file/out", "--store", "store.db"), "--out: cannot write taken/file/out"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("no database" * 100)
    Database(tmp_path / "store.db").close()
    done = subprocess.run(
        [sys.executable, "-m", "stream_monitor", "export", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line
    assert (tmp_path / "taken" / "file").read_text() == "no database" * 100


def test_a_missing_library_is_named_with_the_remedy(
    store: tuple[Running, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "stream_monitor.monitor.export_parquet", raising=False)
    with pytest.raises(ExportError, match=r"Parquet needs pyarrow: pip install 'stream-monitor\[export\]'"):
        export(str(store[1]), tmp_path / "out", "parquet", "", "", "")
    assert not (tmp_path / "out").exists()


def test_an_out_that_may_not_be_looked_into_is_named(store: tuple[Running, Path], closed_folder: Path) -> None:
    out = closed_folder / "out"
    with pytest.raises(ExportError, match=f"^--out: cannot look into {out}: Permission denied$"):
        export(str(store[1]), out, "jsonl", "", "", "")


@pytest.fixture(params=["stopped", "killed"])
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store of three requests, as a monitor leaves it that was stopped in order, or killed."""
    path = tmp_path / "left" / "monitor.db"
    running = Database(tmp_path / "running" / "monitor.db")
    fill(running, range(1, 4), 1, size=0)
    if request.param == "stopped":
        running.close()
    shutil.copytree(tmp_path / "running", path.parent)
    assert Path(f"{path}-wal").exists() == (request.param == "killed")
    return path


def refusing(monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    """Files are opened by a user who may not, with any of these flags."""
    native = os.open

    def opened(path: Any, asked: int, *more: Any, **others: Any) -> int:
        if asked & flags == flags:
            raise PermissionError(13, "Permission denied", path)
        return native(path, asked, *more, **others)

    monkeypatch.setattr(os, "open", opened)


def test_a_store_is_left_as_it_is_and_need_not_be_writable(
    left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The index of the write-ahead log, which SQLite makes anew at will, has the places of readers in it.
    before = {each.name: each.read_bytes() for each in left.parent.iterdir() if not each.name.endswith("-shm")}
    refusing(monkeypatch, os.O_RDWR)
    events, traces = exported(left, tmp_path / "out", "jsonl")
    assert ([event["sequence"] for event in events], len(traces)) == ([1, 2, 3], 3)
    assert {each.name: each.read_bytes() for each in left.parent.iterdir() if not each.name.endswith("-shm")} == before


def test_no_store_is_made(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    with pytest.raises(ExportError, match=f"{path} is another program's database"):
        export(str(path), tmp_path / "out", "jsonl", "", "", "")
    assert path.stat().st_size == 0


@pytest.mark.parametrize("left", ["stopped"], indirect=True)
def test_a_store_that_may_not_be_read_is_named(left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, 0)
    with pytest.raises(ExportError) as refused:
        export(str(left), tmp_path / "out", "jsonl", "", "", "")
    assert str(refused.value) == f"cannot read {left}: Permission denied; export as the user that the monitor runs as"


@pytest.mark.parametrize("left", ["killed"], indirect=True)
def test_a_store_that_only_its_owner_can_open_is_named_with_the_remedy(left: Path, tmp_path: Path) -> None:
    # In place of a folder that cannot be written, which does not keep root from it.
    index = Path(f"{left}-shm")
    index.unlink()
    index.symlink_to("nowhere/to-be-made")
    with pytest.raises(
        ExportError, match=f"copy it with {left.name}-wal to a folder you may write to, and export that"
    ):
        export(str(left), tmp_path / "out", "jsonl", "", "", "")
    copied = tmp_path / "copied"
    copied.mkdir()
    for each in (left, Path(f"{left}-wal")):
        shutil.copy(each, copied)
    events, _ = exported(copied / left.name, tmp_path / "out", "jsonl")
    assert len(events) == 3


@pytest.mark.parametrize("left", ["stopped"], indirect=True)
def test_what_a_monitor_wrote_meanwhile_is_not_half_exported(
    left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*_: object) -> Iterator[list[Any]]:
        other = Database(left)
        fill(other, range(4, 5), 1, size=0)
        other.close()
        yield []

    monkeypatch.setattr("stream_monitor.monitor.export._traces", overtaken)
    with pytest.raises(ExportError, match=f"a monitor began to write to {left} while it was read; export again"):
        export(str(left), tmp_path / "out", "jsonl", "", "", "")
    assert not (tmp_path / "out").exists()
