"""`python -m stream_monitor.publisher`: started by `launch.PublisherProcess`, not by people.

Standard input: one line, the EngineInfo as JSON; then silence until `stop` or the end of the worker.
"""

import argparse
import os
import signal
import sys

import msgspec

from stream_monitor.records import EngineInfo
from stream_monitor.target import Target


def _first_line() -> bytes:
    """Byte by byte, so that nothing after the line is taken into a buffer that the event loop does not see."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            raise SystemExit(0)  # the worker is gone already
        line += byte
    return bytes(line)


def main() -> None:
    """Entry point."""
    # Ctrl-C and a service manager's SIGTERM reach the whole group; the worker still has records to write, and ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -m stream_monitor.publisher")
    parser.add_argument("--ring-fd", type=int, required=True, help="the ring's file descriptor, inherited")
    parser.add_argument("--target", required=True, help="the monitor, a Target as JSON")
    parser.add_argument("--cpus", default="", help="CPUs to run on, such as 1,3; empty: as inherited")
    arguments = parser.parse_args()
    if arguments.cpus:
        # Before gRPC is loaded: its threads inherit this. So far we are pinned to the worker's own core, if it is.
        try:
            os.sched_setaffinity(0, {int(cpu) for cpu in arguments.cpus.split(",")})
        except OSError as error:
            print(f"stream-monitor publisher: cannot run on CPUs {arguments.cpus}: {error.strerror}", file=sys.stderr)
    info = msgspec.json.decode(_first_line(), type=EngineInfo)

    from stream_monitor.publisher.process import publish
    from stream_monitor.ring import RingError

    try:
        publish(arguments.ring_fd, info, msgspec.json.decode(arguments.target, type=Target))
    except RingError as error:
        raise SystemExit(f"stream-monitor publisher: {error}") from None


if __name__ == "__main__":
    main()
