"""What was deleted and must not come back: rows that arrive late, and requests that still run."""

import secrets

from stream_monitor.monitor.database_file import PUBLIC, Keys
from stream_monitor.monitor.identity import TraceKey
from stream_monitor.monitor.merge import MergedStep


class Graveyard:
    """Deleted requests, known by salted hashes of their ids until a time. It is small: requests are deleted by hand."""

    def __init__(self) -> None:
        # One layer a salt; the newest takes what is buried from now on, the first what others of a fleet buried.
        self._layers: list[tuple[Keys, dict[bytes, int]]] = [(PUBLIC, {}), (Keys(secrets.token_bytes(16)), {})]

    def __contains__(self, key: object) -> bool:
        return any(keys.trace(*key) in dead for keys, dead in self._layers if dead)  # type: ignore[misc]

    def __bool__(self) -> bool:
        return any(dead for _, dead in self._layers)

    def bury(self, key: TraceKey, until_ns: int) -> None:
        """Throw away what comes of a request until a time."""
        keys, dead = self._layers[-1]
        dead[keys.trace(*key)] = until_ns

    def bury_hashed(self, hashed: bytes, until_ns: int) -> bool:
        """The same of a request that others deleted, of which they told the hash under PUBLIC; whether it is news."""
        _, dead = self._layers[0]
        news = hashed not in dead
        dead[hashed] = until_ns
        return news

    def load(self, keys: Keys, dead: dict[bytes, int]) -> dict[bytes, int]:
        """Take in what a store knows, and use its salt from now on; all that is known under that salt."""
        if self._layers[-1][0] != keys:
            self._layers.append((keys, {}))
        self._layers[-1][1].update(dead)
        return self._layers[-1][1]

    def expire(self, now_ns: int) -> None:
        """Forget those whose time is over."""
        for _, dead in self._layers:
            for hashed in [hashed for hashed, until in dead.items() if until < now_ns]:
                del dead[hashed]

    def strip(self, step: MergedStep) -> None:
        """Take out of a step what belongs to deleted requests; their rows are discarded as `deleted`."""
        step.leave_out(lambda request_id: (step.instance, request_id) in self, "deleted")
