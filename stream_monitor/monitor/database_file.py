"""The store's file as SQLite has it: how it is opened and made, its transactions, and what is done to it as a whole."""

import contextlib
import hashlib
import os
import secrets
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SCHEMA = 1
APPLICATION = 0x53744D6F
"""SQLite's `application_id` of our files: "StMo"."""
WAL_BYTES = 16 << 20
"""The write-ahead log is cut back to this after a checkpoint."""
BUSY_SECONDS = 5.0
_META = {"epoch": str, "salt": bytes, "newest": int, "forgotten": int}
"""Entries of the table `meta`."""

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE requests (
    serial INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, stored_ns INTEGER NOT NULL, state INTEGER NOT NULL,
    model_name TEXT NOT NULL, engine TEXT NOT NULL, info BLOB NOT NULL, trace BLOB NOT NULL
);
CREATE INDEX requests_stored ON requests (stored_ns);
CREATE INDEX requests_running ON requests (serial) WHERE state = 1;
CREATE TABLE events (
    sequence INTEGER PRIMARY KEY, key BLOB NOT NULL, stored_ns INTEGER NOT NULL, event BLOB NOT NULL
);
CREATE INDEX events_key ON events (key);
CREATE TABLE names (name BLOB, key BLOB, fit INTEGER NOT NULL, PRIMARY KEY (name, key)) WITHOUT ROWID;
CREATE INDEX names_key ON names (key);
CREATE TABLE losses (sequence INTEGER PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE deleted (key BLOB PRIMARY KEY, until_ns INTEGER NOT NULL) WITHOUT ROWID;
"""


class StoreRefused(Exception):
    """The file must not be used. One line that names it and what to do."""


@dataclass(frozen=True)
class Keys:
    """The hashes that indexes hold, for the salt of one store."""

    salt: bytes

    def trace(self, instance: str, request_id: str) -> bytes:
        """Of one trace, 16 bytes."""
        return self.name(f"{instance}\0{request_id}")

    def name(self, name: str) -> bytes:
        """Of an id that requests are found by, 16 bytes."""
        return hashlib.blake2b(name.encode(), key=self.salt, digest_size=16).digest()


PUBLIC = Keys(b"")
"""Hashes by which all who read a fleet's stream know a request. Unsalted: the engine instance in them is random."""


class DatabaseFile:
    """One connection. Several may be open: one writes, others read.

    Attributes:
        epoch: names the store in cursors, from its first day on.
        keys: its hashes.
    """

    def __init__(self, path: Path, salt: bytes | None = None, read_only: bool = False) -> None:
        """Open or create, with `salt` if it is created. Raises StoreRefused, OSError or sqlite3.Error.

        `read_only` opens what is there, needs no right to write, and makes no file of its own where nobody else has
        the store open (see `overtaken`).
        """
        self.path = path
        if not read_only:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Held until the connection is closed: to close any descriptor of the file would drop SQLite's locks on it. It
        # also makes the file ours alone before anything is in it.
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
        self._file = os.open(path, flags | os.O_CLOEXEC, 0o600)
        self._alone = read_only and not os.path.exists(f"{path}-wal")
        self._opened = self._state()
        try:
            # Without a write-ahead log there is no monitor to agree with. SQLite would make one all the same, which it
            # cannot remove without the right to write, and which may be another user's than the monitor's.
            options = f"?{'immutable=1' if self._alone else 'mode=ro'}" if read_only else ""
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}{options}",
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
                uri=True,
            )
            try:
                if not read_only:
                    self._create_if_new(salt or secrets.token_bytes(16))
                self._refuse_others()
                if not read_only:
                    self._prepare()
                self._read_meta()
            except BaseException:
                self._connection.close()
                raise
        except BaseException:
            os.close(self._file)
            raise

    def _create_if_new(self, salt: bytes) -> None:
        run = self._connection.execute
        if run("PRAGMA user_version").fetchone()[0] or run("SELECT 1 FROM sqlite_master").fetchone():
            return
        script = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA};"
        self._connection.executescript(f"BEGIN; {_TABLES} {script} COMMIT;")
        values = {"epoch": uuid.uuid4().hex, "salt": salt, "newest": 0, "forgotten": 0}
        self._connection.executemany("INSERT INTO meta VALUES (?, ?)", values.items())

    def _refuse_others(self) -> None:
        run = self._connection.execute
        if run("PRAGMA application_id").fetchone()[0] != APPLICATION:
            raise StoreRefused(f"store: {self.path} is another program's database; name another file with --store")
        schema = run("PRAGMA user_version").fetchone()[0]
        if schema > SCHEMA:
            raise StoreRefused(
                f"store: {self.path} has schema {schema}, this version knows {SCHEMA}: it was written by a newer "
                "stream-monitor; upgrade, or name another file with --store"
            )

    def _prepare(self) -> None:
        for pragma in (
            "journal_mode = WAL",
            # Each commit is on the disk before it counts as one, not only before the next checkpoint.
            "synchronous = FULL",
            "secure_delete = ON",
            f"journal_size_limit = {WAL_BYTES}",
        ):
            self._connection.execute(f"PRAGMA {pragma}")

    def _read_meta(self) -> None:
        meta = dict(self._connection.execute("SELECT name, value FROM meta").fetchall())
        kinds = {name: type(meta.get(name)) for name in _META}
        if kinds != _META:
            # A page that is damaged may still read as one, with nothing or other things on it.
            raise sqlite3.DatabaseError(f"database disk image is malformed: meta holds {kinds}")
        self.epoch, self.keys = meta["epoch"], Keys(meta["salt"])

    def close(self) -> None:
        """End the connection; the last one to close leaves no write-ahead log."""
        self._connection.close()
        os.close(self._file)

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_mtime_ns, found.st_size

    @property
    def overtaken(self) -> bool:
        """Whether somebody wrote to a store that was opened `read_only` while nobody else had it open: what was read
        since may not fit together."""
        return self._alone and self._state() != self._opened

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; what was done when it ends without error survives any crash."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Several reads of one state."""
        self.run("BEGIN")
        try:
            yield
        finally:
            self.run("COMMIT")

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self._file).st_size

    def check(self) -> None:
        """Read the whole file. Raises sqlite3.DatabaseError if it is damaged."""
        if (found := self.run("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(f"database disk image is malformed: {found}")

    def run(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """One statement."""
        return self._connection.execute(statement, values)

    def run_many(self, statement: str, values: Sequence[Sequence[object]]) -> None:
        """One statement for each row of values, all or none."""
        with self.transaction():
            self._connection.executemany(statement, values)

    def script(self, statements: str) -> None:
        """Several statements, all or none. Outside of a transaction."""
        self._connection.executescript(f"BEGIN IMMEDIATE; {statements} COMMIT;")

    def meta(self, name: str) -> int:
        """`newest`: sequence of the newest finding ever stored. `forgotten`: up to which they were let go."""
        return int(self.run("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0])

    def set_meta(self, name: str, value: int) -> None:
        """Set one of them."""
        self.run("UPDATE meta SET value = ? WHERE name = ?", (value, name))

    @property
    def used_bytes(self) -> int:
        """Bytes in use; the file is larger by what is free for the next rows."""
        pages, free, size = (
            self.run(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    # What removing a request for good needs (erasure.py): outside of a transaction.

    def empty_log(self) -> bool:
        """Move the write-ahead log into the file and cut it to nothing; False if a reader keeps it."""
        return not self.run("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]

    def holds_bytes(self, probes: Sequence[bytes]) -> bool:
        """Whether the file, the write-ahead log aside, holds any of these anywhere."""
        overlap = max(map(len, probes), default=0)
        place, tail = 0, b""
        while chunk := os.pread(self._file, 1 << 20, place):
            place += len(chunk)
            searched = tail + chunk
            if any(probe in searched for probe in probes):
                return True
            tail = searched[-overlap:]
        return False

    def rewrite(self) -> None:
        """The whole file anew, without anything that is not in a row."""
        # The copy that is made on the way holds rows too: it stays in our folder, not in one for temporary files.
        self.run(f"PRAGMA temp_store_directory = '{str(self.path.parent).replace(chr(39), chr(39) * 2)}'")
        self.run("VACUUM")
