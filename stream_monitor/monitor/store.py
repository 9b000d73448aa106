"""The traces held, bounded in number and memory, and the ids they are found by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stream_monitor.monitor.access.rights import Visible
from stream_monitor.monitor.identity import EXACT, TraceKey, names
from stream_monitor.monitor.ranks import Labels
from stream_monitor.monitor.trace import RequestTrace

GONE_SECONDS = 30.0
"""An engine without a connected rank for so long has ended, or its host has: publishers reconnect in seconds."""


@dataclass(slots=True)
class _Holding:
    """What one engine instance has here; `traces` oldest first, `finished` those of requests that left it."""

    traces: dict[TraceKey, None] = field(default_factory=dict)
    finished: dict[TraceKey, None] = field(default_factory=dict)
    bytes: int = 0
    silent_since: float | None = None

    @property
    def oldest(self) -> TraceKey:
        """What goes first: the request that finished longest ago, else the one that began first."""
        return next(iter(self.finished or self.traces))


class TraceStore:
    """Traces by key. When full, the engine that holds most makes room, so that none lives at the others' cost: of its
    requests the one that finished longest ago goes first, then the one that began first.

    Attributes:
        evicted: traces that had to go, by the limit that was reached ("count" or "bytes").
        replaced: finished traces whose id was used again.
        late: traces that began with rows or tokens of a request whose start was not seen.
        serial: of the newest trace; they ascend.
        evicting: told of each trace that has to go, before it goes.
        max_running: requests of one engine instance that are followed at a time; see `over_quota`.
    """

    def __init__(self, max_traces: int, max_bytes: int, max_sentences: int, max_running: int = 1 << 32) -> None:
        self.max_traces = max_traces
        self.max_bytes = max_bytes
        self.max_sentences = max_sentences
        self.max_running = max_running
        self.bytes = 0
        self.evicted = {"count": 0, "bytes": 0}
        self.replaced = 0
        self.late = 0
        self.serial = 0
        self.evicting: Callable[[RequestTrace], None] = lambda _: None
        self._traces: dict[TraceKey, RequestTrace] = {}
        self._weights: dict[TraceKey, int] = {}
        self._engines: dict[str, _Holding] = {}
        self._index: dict[str, dict[TraceKey, int]] = {}

    def __len__(self) -> int:
        return len(self._traces)

    @property
    def finished(self) -> int:
        """Traces of requests that left the engine."""
        return sum(len(holding.finished) for holding in self._engines.values())

    def cut_off(self, connected: set[str], now: float) -> None:
        """Mark the running requests of engines of which no rank was connected for GONE_SECONDS: they were cut off,
        unless the engine comes back. Call now and then; `now` in seconds of a clock that does not jump."""
        for instance, holding in self._engines.items():
            if instance in connected:
                holding.silent_since = None
            elif holding.silent_since is None:
                holding.silent_since = now
            elif now - holding.silent_since >= GONE_SECONDS:
                for key in holding.traces.keys() - holding.finished.keys():
                    self._traces[key].cut = True

    def room(self, instance: str) -> int:
        """How many more running requests of an engine find room here."""
        holding = self._engines.get(instance)
        running = len(holding.traces) - len(holding.finished) if holding else 0
        return self.max_running - running

    def over_quota(self, instance: str) -> Callable[[str], bool]:
        """Which internal ids of an engine find no room beside its running requests. It takes in, first come first
        served, each new id that it says no of, so ask it about what is begun right after."""
        room = self.room(instance)
        admitted: set[str] = set()

        def is_over(request_id: str) -> bool:
            if (instance, request_id) in self._traces or request_id in admitted:
                return False
            if len(admitted) >= room:
                return True
            admitted.add(request_id)
            return False

        return is_over

    def get(self, instance: str, request_id: str) -> RequestTrace | None:
        """The trace of an internal id, if it is held."""
        return self._traces.get((instance, request_id))

    def begin(self, instance: str, request_id: str, labels: Labels, now_ns: int) -> RequestTrace:
        """The running trace of an internal id; a new one if there is none or the id was used and finished before."""
        key = (instance, request_id)
        held = self._traces.get(key)
        if held is not None:
            if not held.finished:
                return held
            self.replaced += 1
            self._drop(key)
        return self._create(key, labels, now_ns)

    def find_or_late(self, instance: str, request_id: str, labels: Labels, now_ns: int) -> RequestTrace:
        """The trace of an internal id; if the monitor has not seen the request start, a trace marked as joined late."""
        held = self._traces.get((instance, request_id))
        if held is not None:
            return held
        self.late += 1
        return self._create((instance, request_id), labels, now_ns)

    def changed(self, trace: RequestTrace) -> None:
        """Weigh a trace again and evict what no longer fits, never the only one."""
        key = (trace.instance, trace.request_id)
        if self._traces.get(key) is not trace:
            return
        holding = self._engines[trace.instance]
        grown = trace.bytes - self._weights[key]
        self.bytes += grown
        holding.bytes += grown
        self._weights[key] += grown
        if trace.finished:
            holding.finished.setdefault(key)
        while len(self._traces) > 1:
            if len(self._traces) > self.max_traces:
                limit = "count"
            elif self.bytes > self.max_bytes:
                limit = "bytes"
            else:
                break
            size = _traces_held if limit == "count" else _bytes_held
            going = max(self._engines.values(), key=size).oldest
            self.evicting(self._traces[going])
            self._drop(going)
            self.evicted[limit] += 1

    def remove(self, key: TraceKey) -> None:
        """Forget a trace, if it is held."""
        if key in self._traces:
            self._drop(key)

    def find(self, request_id: str, visible: Visible) -> list[RequestTrace]:
        """Traces an id may mean, newest first; of several readings of the id, only the best that fits any.

        Traces of tenants that are not `visible` do not exist.
        """
        index = self._index.get(request_id, {})
        found = {key: fit for key, fit in index.items() if visible(self._traces[key].tenant)}
        best = min(found.values(), default=EXACT)
        traces = [self._traces[key] for key, fit in found.items() if fit == best]
        return sorted(traces, key=lambda trace: -trace.serial)

    def newest_first(self) -> Iterator[RequestTrace]:
        """All traces, newest first."""
        return reversed(self._traces.values())

    def _create(self, key: TraceKey, labels: Labels, now_ns: int) -> RequestTrace:
        self.serial += 1
        trace = RequestTrace(key[0], key[1], labels, self.serial, now_ns, self.max_sentences)
        self._traces[key] = trace
        self._weights[key] = trace.bytes
        self.bytes += trace.bytes
        holding = self._engines.setdefault(trace.instance, _Holding())
        holding.traces[key] = None
        holding.bytes += trace.bytes
        for name, fit in names(trace.request_id).items():
            self._index.setdefault(name, {})[key] = fit
        return trace

    def _drop(self, key: TraceKey) -> None:
        trace = self._traces.pop(key)
        weight = self._weights.pop(key)
        self.bytes -= weight
        holding = self._engines[trace.instance]
        holding.bytes -= weight
        del holding.traces[key]
        holding.finished.pop(key, None)
        if not holding.traces:
            del self._engines[trace.instance]
        for name in names(trace.request_id):
            keys = self._index[name]
            del keys[key]
            if not keys:
                del self._index[name]


def _traces_held(holding: _Holding) -> int:
    return len(holding.traces)


def _bytes_held(holding: _Holding) -> int:
    return holding.bytes
