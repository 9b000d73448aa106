"""Files of a trace on a disk that is full, and files that are none."""

import contextlib
import gc
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.folder import whole_folder
from stream_monitor.tracing.parquet import LayerWriter, open_parquet

TABLE = pa.table({"mass": pa.array(np.random.default_rng(0).random(200_000))})


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """Files of at most 1,000 bytes: what is written beyond them fails as on a full disk.

    Not a fixture: pytest reports a test before it ends its fixtures, and the log of a suite is a file as well.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_given_up_on_a_full_disk_is_closed_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its layer is written, its end would not fit: pyarrow tries to write that when the writer is collected."""
    beside: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", beside.append)
    table = TABLE.slice(0, 10).replace_schema_metadata({b"key": b"value" * 300})
    with small_disk():
        writer = LayerWriter(tmp_path / "file.parquet", table.schema)
        writer.write(table)
        del writer
        gc.collect()
    assert beside == []


def write(out: Path, tables: list[pa.Table]) -> None:
    with whole_folder(out) as part:
        writer = LayerWriter(part / "file.parquet", TABLE.schema)
        for table in tables:
            writer.write(table)
        writer.close({b"key": b"value" * 300})


@pytest.mark.parametrize("tables", [[TABLE], [TABLE.slice(0, 10)], [TABLE.slice(0, 10), TABLE]])
def test_a_full_disk_is_one_line_and_leaves_nothing(tables: list[pa.Table], tmp_path: Path) -> None:
    """Whether a layer or the end of the file does not fit."""
    with small_disk(), pytest.raises(TracingError, match=r"^cannot write .*/out: File too large$"):
        write(tmp_path / "out", tables)
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    writer = LayerWriter(path, TABLE.schema)
    writer.write(TABLE)
    writer.write(TABLE.slice(0, 10))
    writer.close({b"key": b"value"})
    found = open_parquet(path, "masses")
    assert [found.metadata.row_group(layer).num_rows for layer in range(2)] == [200_000, 10]
    assert found.metadata.metadata[b"key"] == b"value"


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"", "size is 0"), (b"PAR1junk", "Parquet")])
def test_what_cannot_be_read_is_named(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TracingError, match=f"cannot read the masses in {path}: .*{reason}"):
        open_parquet(path, "masses")
