"""Whether a subscriber that does not read harms those that do, and whether it is told what it lost.

A real monitor serves 49 subscribers that read every event. In blocks that follow each other in turn there is besides:
none; one that opens its stream and does not read; one on a connection of 4 kB/s, an eighth of what is sent to it. When
its block is over it reads all, and must be told of as many events as the monitor counts as lost. The others' delays
with it, from the message that lets an event go until it is there, are judged against the block without it of the same
round.

A slower connection is given up by gRPC, and rightly so: the answer to a ping waits behind the events on their way and
may take 10 seconds (`monitor/front.py`). Such a subscriber goes on from its cursor.
"""

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import grpc
import numpy as np
import typer

from benchmarks.ingest import Publisher
from benchmarks.monitor_process import monitor
from benchmarks.report import Report, bootstrap, run
from benchmarks.subscribers import PATIENCE_SECONDS, subscribers
from benchmarks.traffic import Shape, Traffic
from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc

READERS = 49
ARMS = ("none", "stalled", "trickling")
KINDS = [monitor_pb2.EVENT_KIND_ANCHOR_SHIFT, monitor_pb2.EVENT_KIND_SENTENCE_CLOSED]
ROWS_PER_SECOND = 600.0
SLOWER, GROWN_BYTES = 1.1, 16 << 20
LIMITS = {"max_trace_bytes": 8 << 20, "store": ""}
"""So that the memory for traces is full before anything is measured."""
LOST = "stream_monitor_subscriber_events_lost_total"
WARM_SECONDS = 12.0
TRICKLE_BYTES, TRICKLE_SECONDS = 400, 0.1
"""So much comes through at a time, and how long until the next."""
QUIET = 1.0
"""Seconds after which nothing is on its way any more: subscribers here are never far behind."""


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Each has a block of every kind.")] = 7,
    seconds: Annotated[float, typer.Option(min=4.0, help="Of a block: the slow one must lose in it.")] = 5.0,
    queue: Annotated[int, typer.Option(min=1, help="The monitor's setting subscriber_queue.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the rows.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Four times as many rounds.")] = False,
) -> None:
    """Delays of the others, and what the slow one is told."""
    count = rounds * (4 if full else 1)
    report = Report(
        benchmark="slow_subscriber",
        config={"readers": READERS, "rounds": count, "seconds": seconds, "queue": queue, "rows": ROWS_PER_SECOND},
        seed=seed,
        n=count,
    )
    report.figures["lost_by_readers"] = 0
    report.must["lost_by_readers"] = ("<=", 0)
    cores = sorted(os.sched_getaffinity(0))
    delays: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    lost, told = dict.fromkeys(ARMS, 0.0), dict.fromkeys(ARMS, 0.0)
    cut = dict.fromkeys(ARMS, 0)
    """Blocks in which the slow one's stream was ended: by pings that were not answered in time, say. It is told by
    that, and may go on from its cursor."""
    cpu = dict.fromkeys(ARMS, 0.0)
    grown, missed = dict.fromkeys(ARMS, 0), dict.fromkeys(ARMS, 0)
    with (
        tempfile.TemporaryDirectory() as folder,
        monitor(Path(folder), cores[0], subscriber_queue=queue, **LIMITS) as running,
        subscribers(running.grpc, READERS, cores[-1], KINDS) as reading,
    ):
        os.sched_setaffinity(0, {cores[-1]})
        publisher = Publisher(running, Traffic(Shape(layers=1, heads=32, tokens=256), seed))
        publisher.send(WARM_SECONDS, ROWS_PER_SECOND)
        reading.heard(quiet=QUIET)
        for number in range(count):
            # In another order each time: what drifts falls on all alike.
            for arm in np.roll(ARMS, number).tolist():
                before, lost_before = running.resident_bytes, running.metrics()[LOST]
                with _slow(arm, running.grpc) as slow:
                    sent = publisher.send(seconds, ROWS_PER_SECOND)
                    heard = reading.heard(sent.times, QUIET)
                    cpu[arm] += sent.monitor
                    grown[arm] = max(grown[arm], running.resident_bytes - before)
                    if slow is not None:
                        came, lost_of_it, ended = slow.catch_up()
                        cut[arm] += ended
                        told[arm] += lost_of_it
                        missed[arm] += 0 if ended else abs(heard.events - came - lost_of_it)
                if slow is not None and not ended:
                    lost[arm] += running.metrics()[LOST] - lost_before - heard.lost
                report.figures["lost_by_readers"] += heard.lost
                delays[arm].append(heard.delays)
    for arm, blocks in delays.items():
        report.figures[f"p99_seconds/{arm}"] = _p99(blocks)
        report.figures[f"monitor_cpu_seconds/{arm}"] = cpu[arm] / count
        of_blocks = ", ".join(f"{1e3 * _p99([block]):.0f}" for block in blocks)
        print(
            f"{arm}: others' p99 {1e3 * _p99(blocks):.1f} ms ({of_blocks}), {cpu[arm] / count:.1f} s of the monitor's "
            f"processor time a block; lost {lost[arm]:.0f}, told {told[arm]:.0f}, cut off {cut[arm]}"
        )
    for arm in ARMS[1:]:
        ratios = [_p99([slow]) / _p99([none]) for slow, none in zip(delays[arm], delays["none"], strict=True)]
        report.figures[f"slower/{arm}"] = float(np.median(ratios))
        report.ci[f"slower/{arm}"] = bootstrap(
            {str(number): [ratio] for number, ratio in enumerate(ratios)}, seed, lambda drawn: float(np.median(drawn))
        )
        report.must[f"slower/{arm}"] = ("<=", SLOWER)
        report.figures |= {
            f"lost/{arm}": lost[arm],
            f"told/{arm}": told[arm],
            f"cut_off/{arm}": cut[arm],
            f"grown_bytes/{arm}": grown[arm],
        }
        report.must[f"lost/{arm}"] = (">=", 1)
        report.figures[f"untold/{arm}"] = abs(lost[arm] - told[arm])
        report.must[f"untold/{arm}"] = ("<=", 0)
        # Of all events that the others got, the slow one got or was told to have lost.
        report.figures[f"unaccounted/{arm}"] = missed[arm]
        report.must[f"unaccounted/{arm}"] = ("<=", 0)
        report.must[f"grown_bytes/{arm}"] = ("<=", GROWN_BYTES)
        print(
            f"{arm}: others' p99 {report.figures[f'slower/{arm}']:.2f}x, median of {count} pairs; memory at most "
            f"{grown[arm] / (1 << 20):+.1f} MiB"
        )
    report.finish()


def _p99(blocks: list[list[float]]) -> float:
    return float(np.quantile(np.concatenate(blocks), 0.99))


class _Slow:
    """A subscriber that reads its first response, which is there at once, and then nothing until it is told to."""

    def __init__(self, address: str) -> None:
        # What the transport takes in by itself, before anything is read, is as little as it can be.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
        self._channel = grpc.insecure_channel(address, options)
        stub = monitor_pb2_grpc.MonitorServiceStub(self._channel)
        self._call = stub.Subscribe(monitor_pb2.SubscribeRequest(kinds=KINDS))
        next(self._call)

    def catch_up(self) -> tuple[int, int, bool]:
        """Read until nothing comes any more: how many events came, how many it was told it lost, and whether the
        monitor ended the stream."""
        came = lost = 0
        try:
            while True:
                # The first may take as long as TCP takes to notice that it may send again.
                silent = threading.Timer(QUIET if came else PATIENCE_SECONDS, self._call.cancel)
                silent.start()
                try:
                    response = next(self._call)
                finally:
                    silent.cancel()
                came, lost = came + 1, lost + response.lost
        except grpc.RpcError:
            return came, lost, self._call.code() is not grpc.StatusCode.CANCELLED

    def close(self) -> None:
        """End the subscription."""
        self._channel.close()


class _Trickle:
    """A connection through which what the monitor sends comes slowly, until `opened` is set."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._upstream = host, int(port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.opened = threading.Event()
        self.opened.set()
        self._sockets = [self._listening]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End both halves."""
        self.opened.set()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            client, _ = self._listening.accept()
            monitor = socket.create_connection(self._upstream)
            self._sockets += [client, monitor]
            threading.Thread(target=self._pump, args=(client, monitor, False), daemon=True).start()
            self._pump(monitor, client, True)

    def _pump(self, source: socket.socket, sink: socket.socket, slowly: bool) -> None:
        with suppress(OSError):
            while some := source.recv(TRICKLE_BYTES if slowly and not self.opened.is_set() else 1 << 16):
                sink.sendall(some)
                if slowly and not self.opened.is_set():
                    self.opened.wait(TRICKLE_SECONDS)
        # The end of one half is the end of both: a subscriber that the monitor gave up shall hear it.
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Trickling(_Slow):
    """A subscriber that reads as fast as it can, over such a connection."""

    def __init__(self, address: str) -> None:
        self._trickle = _Trickle(address)
        super().__init__(self._trickle.address)
        self._trickle.opened.clear()

    def catch_up(self) -> tuple[int, int, bool]:
        """See `_Slow`; the connection is a fast one now."""
        self._trickle.opened.set()
        return super().catch_up()

    def close(self) -> None:
        """End the subscription."""
        super().close()
        self._trickle.close()


@contextmanager
def _slow(arm: str, address: str) -> Iterator[_Slow | None]:
    slow = {"none": lambda _: None, "stalled": _Slow, "trickling": _Trickling}[arm](address)
    try:
        yield slow
    finally:
        if slow is not None:
            slow.close()


if __name__ == "__main__":
    run(main)
