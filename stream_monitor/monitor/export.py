"""`stream-monitor export`: a store's events and traces as files for analysis.

It reads the store, not the monitor: so it works after a crash too, and costs a monitor that runs nothing. It reads in
pages, each a moment's state, since a reader that stays would keep deleted requests in the write-ahead log.
"""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import Message

from stream_monitor.client.trace import Trace
from stream_monitor.monitor import recovery
from stream_monitor.monitor.database import Database
from stream_monitor.monitor.database_file import StoreRefused
from stream_monitor.v1alpha1 import monitor_pb2

PAGE = 100
BATCH_BYTES = 16 << 20
"""About most bytes of traces in memory at a time, as the store has them."""
Whose = tuple[str, str]
"""Model and tenant of what is exported; empty for all."""
FORMATS = ("parquet", "jsonl")


class ExportError(Exception):
    """One line."""


class Sink(Protocol):
    """A file that takes rows."""

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""

    def close(self) -> None:
        """End the file."""


def export(store: str, out: Path, format: str, since: str, until: str, model_name: str, tenant: str = "") -> str:
    """Writes `events` and `traces` into the folder `out`, both or neither; what to tell the operator.

    Args:
        store: file of the store.
        out: folder, new or empty.
        format: one of FORMATS.
        since, until: limits on an event's time, and on the time a request was last seen, ISO 8601; local time unless
            they say otherwise. Empty for none.
        model_name, tenant: of the requests; empty for all.

    Raises:
        ExportError: there is no such store, it cannot be read, or `out` is taken.
    """
    if format not in FORMATS:
        raise ExportError(f"--format is {format!r}; valid: {', '.join(FORMATS)}")
    first, last = _time("--since", since, 0), _time("--until", until, 2**63 - 1)
    if not store:
        raise ExportError("the monitor keeps everything in memory (setting store); name a file with --store")
    if _taken(out):
        raise ExportError(f"--out: {out} exists and is not an empty folder")
    database = _open(Path(store))
    parts = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        counts = _write(database, parts, format, first, last, (model_name, tenant))
        with suppress(FileNotFoundError):
            out.rmdir()
        parts.rename(out)
    except OSError as error:
        raise ExportError(f"--out: cannot write {out}: {error.strerror}") from None
    except sqlite3.Error as error:
        raise _unreadable(database.path, error) from None
    finally:
        database.close()
        shutil.rmtree(parts, ignore_errors=True)
    return f"{out}: {counts['events']} events, {counts['traces']} traces"


def _taken(out: Path) -> bool:
    try:
        return out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise ExportError(f"--out: cannot look into {out}: {error.strerror}") from None


def _open(store: Path) -> Database:
    """For reading alone: a store that is backed up, or another user's, is left as it is."""
    try:
        return Database(store, read_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise ExportError(f"there is no store at {store}; name one with --store") from None
    except PermissionError as error:
        raise ExportError(
            f"cannot read {store}: {error.strerror}; export as the user that the monitor runs as"
        ) from None
    except OSError as error:
        raise ExportError(f"cannot read {store}: {error.strerror}") from None
    except StoreRefused as error:
        raise ExportError(error) from None
    except sqlite3.Error as error:
        raise _unreadable(store, error) from None


def _unreadable(store: Path, error: sqlite3.Error) -> ExportError:
    remedy = ""
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_CANTOPEN:
        # Of a monitor that was killed: SQLite must write beside it what it reads the write-ahead log by.
        remedy = (
            f"; if its monitor is gone, copy it with {store.name}-wal to a folder you may write to, and export that"
        )
    return ExportError(f"cannot read {store} ({recovery.reason(error)}: {error}){remedy}")


def _write(database: Database, folder: Path, format: str, first: int, last: int, whose: Whose) -> dict[str, int]:
    counts = {}
    try:
        for name, rows in (
            ("events", _events(database, first, last, whose)),
            ("traces", _traces(database, first, last, whose)),
        ):
            sink = _sink(folder / f"{name}.{format}", name, format)
            counts[name] = 0
            try:
                for page in rows:
                    sink.write(page)
                    counts[name] += len(page)
            finally:
                sink.close()
    finally:
        if database.overtaken:
            raise ExportError(f"a monitor began to write to {database.path} while it was read; export again")
    return counts


def _events(database: Database, first: int, last: int, whose: Whose) -> Iterator[list[dict[str, Any]]]:
    after, end = database.meta("forgotten"), database.meta("newest")
    while after < end:
        page = database.events_after(after, PAGE)
        yield [
            _plain(event) | {"sequence": sequence}
            for sequence, event, _ in page.events
            if first <= event.wall_time_ns < last and _is_of(event, whose)
        ]
        after = page.last


def _traces(database: Database, first: int, last: int, whose: Whose) -> Iterator[list[dict[str, Any]]]:
    before = 2**63 - 1
    while page := database.infos(before, PAGE, whose[0], "", "", 0):
        rows, size = [], 0
        for _, info in page:
            if first <= info.last_seen_ns < last and _is_of(info, whose):
                found = database.trace((info.key.engine_instance, info.key.request_id))
                if found is not None:
                    rows.append(_trace(Trace.of(found)))
                    size += found.ByteSize()
                    if size >= BATCH_BYTES:
                        yield rows
                        rows, size = [], 0
        yield rows
        before = page[-1][0]


def _is_of(message: monitor_pb2.Event | monitor_pb2.RequestInfo, whose: Whose) -> bool:
    model_name, tenant = whose
    return model_name in ("", message.model_name) and tenant in ("", message.tenant)


def _trace(trace: Trace) -> dict[str, Any]:
    """One request as a row: its info, its sentences, its heads, and its arrays."""
    return _plain(trace.info) | {
        "sentence_list": [_plain(sentence) for sentence in trace.sentences],
        "heads": [_plain(head) for head in trace.heads],
        "matrix_row": trace.matrix.row,
        "matrix_column": trace.matrix.column,
        "matrix_share": trace.matrix.share,
        "unobserved_share": trace.unobserved_share,
        "captured_rows": trace.captured_rows,
        "vertical_score": trace.vertical_score,
        "receiver_score": trace.receiver_score,
        "corrected_score": trace.corrected_score,
        "head_row": trace.by_head.row,
        "head_column": trace.by_head.column,
        "head_index": trace.by_head.head,
        "head_share": trace.by_head.share,
    }


def _plain(message: Message) -> dict[str, Any]:
    """A message as a row: enums by name, the parts of `key` at the top, None for what is absent."""
    row: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.name == "key":
            row |= _plain(value)
        elif field.is_repeated:
            row[field.name] = [_value(field, each) for each in value]
        else:
            absent = field.has_presence and not message.HasField(field.name)
            row[field.name] = None if absent else _value(field, value)
    return row


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return _plain(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def _time(option: str, text: str, default: int) -> int:
    if not text:
        return default
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ExportError(f"{option} is {text!r}; valid: a time such as 2026-11-26 or 2026-11-26T07:00+01:00") from None
    epoch = datetime.fromtimestamp(0, UTC)
    return int((moment.astimezone() - epoch).total_seconds() * 1e9)


def _sink(path: Path, name: str, format: str) -> Sink:
    if format == "jsonl":
        return JsonLines(path)
    try:
        from stream_monitor.monitor.export_parquet import ParquetFile
    except ImportError as error:
        raise ExportError(f"Parquet needs {error.name}: pip install 'stream-monitor[export]'") from None
    return ParquetFile(path, name)


class JsonLines:
    """One JSON object a line; NaN, of which JSON knows nothing, as null."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""
        for row in rows:
            self._file.write(json.dumps(_without_nan(row), allow_nan=False, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """End the file."""
        self._file.close()


def _without_nan(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _without_nan(value.tolist())
    if isinstance(value, float):
        return value if value == value else None
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return value
