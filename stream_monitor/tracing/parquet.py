"""Opening the Parquet files of a trace."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stream_monitor.tracing.errors import TracingError


def open_parquet(path: Path, content: str) -> pq.ParquetFile:
    """The file at `path`, said to hold `content`.

    Raises:
        TracingError: it cannot be read, or is no such file at all.
    """
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TracingError(f"cannot read the {content} in {path}: {reason}") from error
