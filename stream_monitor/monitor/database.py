"""The store's file: an SQLite database in WAL mode. Everything here blocks; who calls it keeps it off the event loop.

A row holds a serialized message of `monitor.proto` and what it is found by. Ids stand in those messages alone: indexes
hold salted hashes, so that a request that is deleted leaves no id behind in them.
"""

import contextlib
import hashlib
import os
import secrets
import sqlite3
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stream_monitor.monitor.identity import TraceKey, names
from stream_monitor.v1alpha1 import monitor_pb2

SCHEMA = 1
APPLICATION = 0x53744D6F
"""SQLite's `application_id` of our files: "StMo"."""
WAL_BYTES = 16 << 20
"""The write-ahead log is cut back to this after a checkpoint."""
BUSY_SECONDS = 5.0
ZLIB_LEVEL = 1
"""Traces are mostly small numbers in wide arrays."""

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


Listed = tuple[int, monitor_pb2.RequestInfo]
"""A request's place in the list, which ascends with the time it began, and what is listed."""


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


@dataclass(frozen=True, slots=True)
class StoredTrace:
    """One request: `info` is a RequestInfo, `trace` a GetTraceResponse without it, both serialized."""

    instance: str
    request_id: str
    serial: int
    state: int
    model_name: str
    engine: str
    info: bytes
    trace: bytes

    @property
    def size(self) -> int:
        """Bytes, about."""
        return len(self.info) + len(self.trace) + 512


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One finding, serialized, with its place in the event log."""

    sequence: int
    instance: str
    request_id: str
    event: bytes


@dataclass(frozen=True, slots=True)
class EventPage:
    """Findings in order, each with how many before it are lost; `last` is the sequence the page ends at, `lost` what is
    lost between the last finding and there."""

    events: list[tuple[int, monitor_pb2.Event, int]]
    last: int
    lost: int = 0


class Database:
    """One connection. Several may be open: one writes, others read.

    Attributes:
        epoch: names the store in cursors, from its first day on.
        keys: its hashes.
    """

    def __init__(self, path: Path, salt: bytes | None = None) -> None:
        """Open or create, with `salt` if it is created. Raises StoreRefused, OSError or sqlite3.Error."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        # Held until the connection is closed: to close any descriptor of the file would drop SQLite's locks on it. It
        # also makes the file ours alone before anything is in it.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(salt or secrets.token_bytes(16))
            except BaseException:
                self._connection.close()
                raise
        except BaseException:
            os.close(self._file)
            raise

    def _prepare(self, salt: bytes) -> None:
        run = self._connection.execute
        if not run("PRAGMA user_version").fetchone()[0] and not run("SELECT 1 FROM sqlite_master").fetchone():
            self._create(salt)
        if run("PRAGMA application_id").fetchone()[0] != APPLICATION:
            raise StoreRefused(f"store: {self.path} is another program's database; name another file with --store")
        schema = run("PRAGMA user_version").fetchone()[0]
        if schema > SCHEMA:
            raise StoreRefused(
                f"store: {self.path} has schema {schema}, this version knows {SCHEMA}: it was written by a newer "
                "stream-monitor; upgrade, or name another file with --store"
            )
        for pragma in (
            "journal_mode = WAL",
            # Each commit is on the disk before it counts as one, not only before the next checkpoint.
            "synchronous = FULL",
            "secure_delete = ON",
            f"journal_size_limit = {WAL_BYTES}",
        ):
            run(f"PRAGMA {pragma}")
        meta = dict(run("SELECT name, value FROM meta").fetchall())
        self.epoch, self.keys = str(meta["epoch"]), Keys(bytes(meta["salt"]))

    def _create(self, salt: bytes) -> None:
        script = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA};"
        self._connection.executescript(f"BEGIN; {_TABLES} {script} COMMIT;")
        values = {"epoch": uuid.uuid4().hex, "salt": salt, "newest": 0, "forgotten": 0}
        self._connection.executemany("INSERT INTO meta VALUES (?, ?)", values.items())

    def close(self) -> None:
        """End the connection; the last one to close leaves no write-ahead log."""
        self._connection.close()
        os.close(self._file)

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

    # Writing: inside a transaction.

    def add_events(self, events: Iterable[StoredEvent], now_ns: int) -> None:
        """Findings, in ascending sequence."""
        for event in events:
            key = self._named(event.instance, event.request_id)
            self.run("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?)", (event.sequence, key, now_ns, event.event))
            self.set_meta("newest", event.sequence)

    def add_loss(self, sequence: int, count: int) -> None:
        """`count` findings before `sequence` could not be stored."""
        self.run("INSERT OR REPLACE INTO losses VALUES (?, ?)", (sequence, count))

    def put_traces(self, traces: Iterable[StoredTrace], now_ns: int) -> None:
        """Requests; what was stored of them before is replaced."""
        for trace in traces:
            key = self._named(trace.instance, trace.request_id)
            columns = (trace.serial, key, now_ns, trace.state, trace.model_name, trace.engine)
            self.run("DELETE FROM requests WHERE key = ?", (key,))
            self.run(
                "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*columns, trace.info, zlib.compress(trace.trace, ZLIB_LEVEL)),
            )

    def bury(self, dead: dict[bytes, int]) -> None:
        """Mark requests as deleted, by key, until a time."""
        self._connection.executemany("INSERT OR REPLACE INTO deleted VALUES (?, ?)", dead.items())

    def _named(self, instance: str, request_id: str) -> bytes:
        """The key of a request, which is found by all its ids from now on."""
        key = self.keys.trace(instance, request_id)
        found = ((self.keys.name(name), key, fit) for name, fit in names(request_id).items())
        self._connection.executemany("INSERT OR IGNORE INTO names VALUES (?, ?, ?)", found)
        return key

    def cut_running(self) -> None:
        """What an earlier monitor left running will not go on under it."""
        self.run(
            "UPDATE requests SET state = ? WHERE state = ?",
            (monitor_pb2.REQUEST_STATE_CUT, monitor_pb2.REQUEST_STATE_RUNNING),
        )

    # Reading.

    def tombstones(self) -> dict[bytes, int]:
        """Keys of requests that were deleted, and until when what comes of them is thrown away."""
        return dict(self.run("SELECT key, until_ns FROM deleted").fetchall())

    def newest_serial(self) -> int:
        """Of all requests held; 0 if there are none."""
        return int(self.run("SELECT max(serial) FROM requests").fetchone()[0] or 0)

    def events_after(self, sequence: int, limit: int) -> EventPage:
        """The next findings after a sequence."""
        with self._snapshot():
            rows = self.run(
                "SELECT sequence, event FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?", (sequence, limit)
            ).fetchall()
            last = rows[-1][0] if len(rows) == limit else max(self.meta("newest"), sequence)
            losses = self.run(
                "SELECT sequence, count FROM losses WHERE sequence > ? AND sequence <= ? ORDER BY sequence",
                (sequence, last),
            ).fetchall()
        found = []
        for number, raw in rows:
            lost = 0
            while losses and losses[0][0] <= number:
                lost += losses.pop(0)[1]
            found.append((number, monitor_pb2.Event.FromString(raw), lost))
        return EventPage(found, last)

    def newest_events(self, limit: int) -> list[tuple[int, monitor_pb2.Event]]:
        """The newest findings, oldest first, none of them lost in between."""
        rows = self.run(
            "SELECT sequence, event FROM events WHERE sequence >= (SELECT coalesce(max(sequence), 0) FROM losses) "
            "ORDER BY sequence DESC LIMIT ?",
            (limit,),
        ).fetchall()
        return [(sequence, monitor_pb2.Event.FromString(raw)) for sequence, raw in reversed(rows)]

    def find(self, name: str) -> list[tuple[TraceKey, int]]:
        """Requests with a trace or findings that an id may mean, newest first, and how well it fits."""
        rows = self.run(
            "SELECT key, fit, info FROM names LEFT JOIN requests USING (key) WHERE name = ? ORDER BY serial DESC",
            (self.keys.name(name),),
        ).fetchall()
        return [(self._key(key, info), fit) for key, fit, info in rows]

    def _key(self, key: bytes, info: bytes | None) -> TraceKey:
        if info is not None:
            found = monitor_pb2.RequestInfo.FromString(info).key
        else:  # Its trace is not held any more, its findings are.
            raw = self.run("SELECT event FROM events WHERE key = ?", (key,)).fetchone()[0]
            found = monitor_pb2.Event.FromString(raw).key
        return found.engine_instance, found.request_id

    def infos(self, before: int, limit: int, model_name: str, engine: str, name: str, fit: int) -> list[Listed]:
        """Requests with a serial below `before`, newest first; empty filters match all, `fit` goes with `name`."""
        where = ["serial < ?1"]
        if model_name:
            where.append("model_name = ?2")
        if engine:
            where.append("engine = ?3")
        if name:
            where.append("key IN (SELECT key FROM names WHERE name = ?4 AND fit = ?5)")
        rows = self.run(
            f"SELECT serial, state, info FROM requests WHERE {' AND '.join(where)} ORDER BY serial DESC LIMIT ?6",
            (before, model_name, engine, self.keys.name(name), fit, limit),
        )
        return [(serial, _info(raw, state)) for serial, state, raw in rows]

    def trace(self, key: TraceKey) -> monitor_pb2.GetTraceResponse | None:
        """A whole trace."""
        row = self.run("SELECT state, info, trace FROM requests WHERE key = ?", (self.keys.trace(*key),)).fetchone()
        if row is None:
            return None
        trace = monitor_pb2.GetTraceResponse.FromString(zlib.decompress(row[2]))
        trace.info.CopyFrom(_info(row[1], row[0]))
        return trace

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Several reads of one state."""
        self.run("BEGIN")
        try:
            yield
        finally:
            self.run("COMMIT")


def _info(raw: bytes, state: int) -> monitor_pb2.RequestInfo:
    info = monitor_pb2.RequestInfo.FromString(raw)
    info.state = state  # type: ignore[assignment]
    return info
