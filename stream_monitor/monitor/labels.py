"""What an operator says of single requests: in which of them an injection was followed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stream_monitor.anchors.probe_fitting import FOLLOWED
from stream_monitor.anchors.profile import ProfileError


@dataclass(frozen=True)
class Label:
    """Of one request; see `Labelled`."""

    group: str
    wording: str


def read_labels(path: Path) -> Mapping[str, Label]:
    """Request id, internal or external, to its label: lines of JSON with the strings `request`, `group` and `wording`.

    Raises:
        ProfileError: the file cannot be read, or holds something else, or nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ProfileError(f"cannot read {path}: {reason}") from error
    found: dict[str, Label] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{path}, line {number}: not JSON") from error
        keys = ("request", "group", "wording")
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key] for key in keys):
            raise ProfileError(f"{path}, line {number}: not an object with the strings request, group and wording")
        if found.setdefault(row["request"], label := Label(row["group"], row["wording"])) != label:
            raise ProfileError(f"{path}, line {number}: {row['request']} has another label above")
    if FOLLOWED not in {label.group for label in found.values()}:
        raise ProfileError(f"{path} names no request of the group {FOLLOWED!r}")
    return found
