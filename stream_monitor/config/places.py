"""Where sockets and files live unless told otherwise."""

import os
from pathlib import Path

from stream_monitor.socket_folders import own_folder


def runtime_folder() -> Path:
    """Where sockets live unless told otherwise: `$XDG_RUNTIME_DIR/stream-monitor`, else a folder of this user's."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "stream-monitor" if base else own_folder()


def default_target() -> str:
    """The Unix socket on which `stream-monitor serve` listens and to which publishers connect."""
    return f"unix:{runtime_folder() / 'ingest.sock'}"


def default_store() -> str:
    """Where `stream-monitor serve` keeps events and traces: the user's folder for state that outlives a restart."""
    base = os.environ.get("XDG_STATE_HOME")
    folder = Path(base) if base else Path(os.path.expanduser("~")) / ".local" / "state"
    return str(folder / "stream-monitor" / "monitor.db")


def default_fleet_store() -> str:
    """Where `stream-monitor fleet` keeps what it read of the stream."""
    return str(Path(default_store()).with_name("fleet.db"))
