"""What an operator says of single requests: in which of them an injection was followed, and where one goes on with
another subject."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stream_monitor.anchors.profile import ProfileError
from stream_monitor.anchors.untrusted_fitting import FOLLOWED

_T = TypeVar("_T")


@dataclass(frozen=True)
class Label:
    """Of one request; see `untrusted_fitting.Labelled`."""

    group: str
    wording: str


@dataclass(frozen=True)
class JointLabel:
    """Of one request; see `shift_fitting.Labelled`.

    Attributes:
        subject: that it begins with.
        token: the first that is about another, counted from the context's first; None if none is.
    """

    subject: str
    token: int | None


def read_labels(path: Path) -> Mapping[str, Label]:
    """Request id, internal or external, to its label: lines of JSON with the strings `request`, `group` and `wording`.

    Raises:
        ProfileError: the file cannot be read, or holds something else, or nothing.
    """
    found: dict[str, Label] = {}
    for where, row in _rows(path):
        if not _strings(row, "request", "group", "wording"):
            raise ProfileError(f"{where}: not an object with the strings request, group and wording")
        _put(found, where, row["request"], Label(row["group"], row["wording"]))
    if FOLLOWED not in {label.group for label in found.values()}:
        raise ProfileError(f"{path} names no request of the group {FOLLOWED!r}")
    return found


def read_joints(path: Path) -> Mapping[str, JointLabel]:
    """Request id, internal or external, to its label: lines of JSON with the strings `request` and `subject` and the
    number `token`, or null.

    Raises:
        ProfileError: the file cannot be read, or holds something else, or no joint.
    """
    found: dict[str, JointLabel] = {}
    for where, row in _rows(path):
        if not _strings(row, "request", "subject") or not _is_token(row.get("token", -1)):
            raise ProfileError(f"{where}: not an object with the strings request and subject and a token or null")
        _put(found, where, row["request"], JointLabel(row["subject"], row["token"]))
    if all(label.token is None for label in found.values()):
        raise ProfileError(f"{path} names no request with a token from which it is about another subject")
    return found


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """What each line that is not blank holds, and where it stands."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ProfileError(f"cannot read {path}: {reason}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{where}: not JSON") from error
        yield where, row


def _strings(row: Any, *keys: str) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) and row[key] for key in keys)


def _is_token(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _put(found: dict[str, _T], where: str, request: str, label: _T) -> None:
    if found.setdefault(request, label) != label:
        raise ProfileError(f"{where}: {request} has another label above")
