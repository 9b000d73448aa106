"""The Parquet files of a trace: a row group per layer, written as layers come."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stream_monitor.tracing.errors import TracingError

_DAMAGED = (
    OSError,
    pa.ArrowException,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What bytes that were changed may end in: pyarrow checks little of what it reads."""


class LayerWriter:
    """Writes a table per layer; the file is readable once `close` was called.

    One that is given up, because another file of the trace could not be written, is closed when it is collected.
    pyarrow would do so too, but print it if that fails for want of space.

    Raises:
        OSError: from any method, if it cannot be written.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        weakref.finalize(self, _close_quietly, self._writer)

    def write(self, table: pa.Table) -> None:
        """Adds the next layer."""
        self._writer.write_table(table, row_group_size=len(table))

    def close(self, metadata: dict[bytes, bytes] | None = None) -> None:
        """Finishes the file."""
        self._writer.add_key_value_metadata(metadata or {})
        self._writer.close()


def _close_quietly(writer: pq.ParquetWriter) -> None:
    with suppress(OSError):
        writer.close()


@contextmanager
def readable(path: Path, content: str) -> Iterator[None]:
    """Around what reads from a file: raises TracingError where that shows that the file is damaged."""
    try:
        yield
    except _DAMAGED as error:
        if isinstance(error, TracingError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TracingError(f"cannot read the {content} in {path}: {' '.join(str(reason).split())}") from error


def open_parquet(path: Path, content: str) -> pq.ParquetFile:
    """The file at `path`, said to hold `content`.

    Raises:
        TracingError: it cannot be read, or is no such file at all.
    """
    with readable(path, content):
        return pq.ParquetFile(path)
    raise AssertionError("the file is open, or an error was raised")
