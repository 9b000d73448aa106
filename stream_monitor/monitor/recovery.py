"""What may be wrong with the store's file, and what is done about it."""

import fcntl
import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from stream_monitor.monitor.database import Database
from stream_monitor.monitor.database_file import StoreRefused

CHECKED_BYTES = 64 << 20
"""Files up to this size are read whole when they are opened, in some tenths of a second; of larger ones only what is
needed, so that the monitor is ready at once. Damage that is met later is handled alike."""
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG)
"""The last where a damaged page gives a length beyond what SQLite takes: nothing we write comes near that."""
_BY_CODE = {
    sqlite3.SQLITE_FULL: "disk_full",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_CANTOPEN: "cannot_open",
    sqlite3.SQLITE_PERM: "cannot_open",
    sqlite3.SQLITE_BUSY: "busy",
    sqlite3.SQLITE_LOCKED: "busy",
}
REASONS = ("disk_full", "read_only", "cannot_open", "busy", "io_error", "corrupt", "refused", "error", "queue_full")
"""Why the store cannot be written; the label `reason` of `stream_monitor_store_lost_total`."""
_ASIDE = ".corrupt-"


def is_corrupt(error: BaseException) -> bool:
    """Whether the file's content is damaged, or not a database at all."""
    if not isinstance(error, sqlite3.DatabaseError):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _CORRUPT:
        return True
    # Ours (`Database.check`), and Python's word for text that is none.
    return "malformed" in str(error) or "Could not decode" in str(error)


def reason(error: BaseException) -> str:
    """Which of REASONS an error is."""
    if is_corrupt(error):
        return "corrupt"
    if isinstance(error, StoreRefused):
        return "refused"
    if isinstance(error, sqlite3.Error):
        return _BY_CODE.get((getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF, "io_error")
    return "cannot_open" if isinstance(error, OSError) else "error"


class Lock:
    """One monitor a store. The kernel lets go of it however the monitor ends."""

    def __init__(self, path: Path) -> None:
        """Raises StoreRefused if another process holds it, OSError if the folder cannot be written."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise StoreRefused(
                f"store: {path} is in use by another monitor; name another file with --store, or none: --store ''"
            ) from None

    def release(self) -> None:
        """Let go."""
        os.close(self._file)


def open_store(path: Path, salt: bytes | None = None) -> tuple[Database, Path | None]:
    """The store, a new one (with `salt`) if there is none or it is damaged, and where the damaged file lies now.

    Raises StoreRefused, OSError or sqlite3.Error.
    """
    try:
        database = Database(path, salt)
        try:
            if database.file_bytes <= CHECKED_BYTES:
                database.check()
        except BaseException:
            database.close()
            raise
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        aside = set_aside(path)
        return Database(path, salt), aside
    return database, None


def set_aside(path: Path) -> Path:
    """Renames a file that cannot be read, with its write-ahead log. All connections to it must be closed."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    aside = Path(f"{path}{_ASIDE}{stamp}")
    while aside.exists():
        aside = Path(f"{aside}x")
    for end in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{end}", f"{aside}{end}")
            # Its time begins now, however long nobody wrote to it.
            os.utime(f"{aside}{end}")
    return aside


def let_go_aside(path: Path, before_ns: int) -> None:
    """Removes files that were set aside before a time: they hold requests as the store does."""
    for aside in path.parent.glob(f"{path.name}{_ASIDE}*"):
        with suppress(OSError):
            if aside.stat().st_mtime_ns < before_ns:
                aside.unlink()
