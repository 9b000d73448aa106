"""A result that is there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stream_monitor.tracing.errors import TracingError


def check_free(out: Path) -> None:
    """Raises TracingError unless a result can be put at `out`: it is absent, or an empty folder, and may be made."""
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
        place = next(folder for folder in out.absolute().parents if folder.exists())
    except OSError as error:
        raise TracingError(f"cannot write {out}: {error.strerror}") from None
    if taken:
        raise TracingError(f"{out} exists already; name a new folder, or an empty one")
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise TracingError(f"cannot write {out}: {place} is not a folder that may be written")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` to write into, renamed to `out` at the end; removed if anything goes wrong.

    Raises:
        TracingError: it cannot be written, such as for want of space.
    """
    check_free(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        try:
            yield part
            part.chmod(0o755)  # mkdtemp's is private
            part.replace(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise TracingError(f"cannot write {out}: {reason}") from error
