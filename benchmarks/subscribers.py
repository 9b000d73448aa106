"""Subscribers in a process of their own: when each got what, and what it was told that it lost.

`python -m benchmarks.subscribers ADDRESS COUNT KIND ...` subscribes to these kinds, findings if none, prints `ready`,
and answers each line on standard input, a JSON list of times of steps, with a JSON line of what came since the line
before: of every event the seconds from the engine's step that closed its sentence, or if there are times, from the
first of them after that step.
"""

import asyncio
import bisect
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import grpc

from stream_monitor.v1alpha1 import monitor_pb2

Kinds = Sequence[monitor_pb2.EventKind.ValueType]
_SUBSCRIBE = "/stream_monitor.v1alpha1.MonitorService/Subscribe"


QUIET_SECONDS, PATIENCE_SECONDS = 3.0, 60.0
"""When nothing came for so long, nothing is on its way any more. It may take so long until all have all."""


class Heard(NamedTuple):
    """What came to all subscribers.

    Attributes:
        delays: seconds of every event at each of them.
        events: that each of them got, or was told it lost.
        lost: of all of them, as the monitor told them.
    """

    delays: list[float]
    events: int
    lost: int


class Subscribers:
    """A running process of them."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def heard(self, steps: Sequence[int] = (), quiet: float = QUIET_SECONDS) -> Heard:
        """What came since the last call, once all have all of it: nothing for `quiet` seconds.

        Delays are from the step that closed a sentence; or, given the times of `steps`, from the one after it, as its
        event waits for the next row of its request, and be it for a pause in the traffic.
        """
        delays, counts, lost = self._more(steps)
        deadline = time.monotonic() + PATIENCE_SECONDS
        came = True
        while came or len(set(counts)) > 1:
            assert time.monotonic() < deadline, f"not all got the same: {sorted(counts)}"
            time.sleep(quiet)
            more = self._more(steps)
            came = any(more[1])
            delays, lost = delays + more[0], lost + more[2]
            counts = [before + now for before, now in zip(counts, more[1], strict=True)]
        return Heard(delays, counts[0], lost)

    def _more(self, steps: Sequence[int]) -> tuple[list[float], list[int], int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(list(steps)), file=self._process.stdin, flush=True)
        delays, counts, lost = json.loads(self._process.stdout.readline())
        return delays, counts, lost


@contextmanager
def subscribers(address: str, count: int, core: int | None = None, kinds: Kinds = ()) -> Iterator[Subscribers]:
    """Begins them, on one core if that is given, and ends them. They want findings, if no kinds are given."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.subscribers", address, *map(str, [count, *kinds])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Subscribers(process)
    finally:
        process.terminate()
        process.communicate()


async def _subscribe(
    address: str,
    kinds: Kinds,
    came: list[tuple[int, int]],
    counts: list[int],
    lost: list[int],
    ready: asyncio.Event,
) -> None:
    """One subscriber, on a connection of its own, for ever."""
    place = len(counts)
    counts.append(0)
    async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_stream(
            _SUBSCRIBE,
            request_serializer=monitor_pb2.SubscribeRequest.SerializeToString,
            response_deserializer=monitor_pb2.SubscribeResponse.FromString,
        )(monitor_pb2.SubscribeRequest(kinds=kinds))
        async for response in call:
            now = time.time_ns()
            ready.set()
            if response.HasField("event"):
                counts[place] += 1 + response.lost
                lost[0] += response.lost
                if response.event.closed_time_ns:
                    came.append((response.event.closed_time_ns, now))


def _released(closed: int, steps: list[int]) -> int:
    """When the event of a sentence could be known."""
    return next(iter(steps[bisect.bisect_right(steps, closed) :]), closed)


async def _main(address: str, count: int, kinds: Kinds) -> None:
    came: list[tuple[int, int]] = []  # when its sentence was closed, and when it was here
    counts: list[int] = []
    lost = [0]
    ready = [asyncio.Event() for _ in range(count)]
    tasks = [asyncio.create_task(_subscribe(address, kinds, came, counts, lost, each)) for each in ready]
    await asyncio.gather(*(each.wait() for each in ready))
    print("ready", flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        steps = json.loads(line)
        delays = [(now - _released(closed, steps)) / 1e9 for closed, now in came]
        print(json.dumps([delays, counts, lost[0]]), flush=True)
        came.clear()
        counts[:] = [0] * count
        lost[0] = 0
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(
        _main(sys.argv[1], int(sys.argv[2]), [monitor_pb2.EventKind.ValueType(int(kind)) for kind in sys.argv[3:]])
    )
