"""Folders of Unix sockets: this user's own, and whether one can be trusted."""

import os
import stat
import tempfile
from pathlib import Path


def own_folder() -> Path:
    """Of this user's sockets where the system names no folder for such. Anybody may have made it first."""
    return Path(tempfile.gettempdir()) / f"stream-monitor-{os.getuid()}"


def folder_fault(folder: Path) -> str:
    """Why somebody else may put sockets into a folder; empty if nobody else may. Raises OSError."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is not a folder (or a symbolic link to one)"
    if found.st_uid != os.getuid():
        return f"folder {folder} belongs to user {found.st_uid}, not to us ({os.getuid()})"
    if found.st_mode & 0o007:
        return f"folder {folder} is open to every user; it must be 0770 or stricter"
    return ""
