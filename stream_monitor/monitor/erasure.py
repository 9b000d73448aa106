"""How requests leave the store's files for good.

`secure_delete` overwrites rows that are deleted. It does not reach copies that SQLite left behind earlier, when it
moved rows from one page to another: about one deletion in a few hundred leaves such a copy. So the file is searched
afterwards for the ids, and rewritten where one is found.
"""

import time
from collections.abc import Sequence

from stream_monitor.monitor.database import Database
from stream_monitor.monitor.retention import Removed

SHORTEST_PROBE = 12
"""Bytes of the shortest id that is searched for; shorter ones are found in anything."""
LOG_SECONDS = 10.0
"""How long readers may keep the write-ahead log from being emptied."""


class ErasureUnfinished(Exception):
    """The rows are gone; a reader keeps the write-ahead log from being emptied."""


def erase(database: Database, requests: Sequence[tuple[str, str]], until_ns: int) -> Removed:
    """Removes requests, their findings and their names, and marks them as deleted.

    Args:
        database: the connection that writes.
        requests: engine instance and internal id of each.
        until_ns: how long what comes late of them is recognised.

    Raises:
        ErasureUnfinished, sqlite3.Error.
    """
    removed = Removed()
    with database.transaction():
        for instance, request_id in requests:
            key = database.keys.trace(instance, request_id)
            database.bury({key: until_ns})
            removed["trace", "deleted"] += database.run("DELETE FROM requests WHERE key = ?", (key,)).rowcount
            removed["event", "deleted"] += database.run("DELETE FROM events WHERE key = ?", (key,)).rowcount
            database.run("DELETE FROM names WHERE key = ?", (key,))
    _empty_log(database)
    # Every row of a request holds its internal id.
    probes = [probe for _, name in requests if len(probe := name.encode()) >= SHORTEST_PROBE]
    if len(probes) < len(requests) or database.holds_bytes(probes):
        database.rewrite()
        _empty_log(database)
    return removed


def _empty_log(database: Database) -> None:
    deadline = time.monotonic() + LOG_SECONDS
    while not database.empty_log():
        if time.monotonic() > deadline:
            raise ErasureUnfinished
        time.sleep(0.05)
