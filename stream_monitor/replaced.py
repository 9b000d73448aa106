"""Telling that files were replaced while a process runs: certificates, keys, tokens."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

Mark = tuple[tuple[int, int, int] | None, ...]


def mark(paths: Iterable[str | Path]) -> Mark:
    """Differs after one of them was replaced, also where a link is swapped, as Kubernetes does with mounted secrets."""
    return tuple(_of(path) for path in paths)


def _of(path: str | Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None
