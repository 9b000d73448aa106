"""What a stranger can do to a monitor, its files and its ring by sending or writing nearly anything.

The attacks are those of `tests/fuzz`, for longer: streams of summaries and calls with anything in them changed, bytes
that look like HTTP, damaged files, garbage in the ring. Each example is drawn from a seed, and a failure names it. A
real monitor must live, answer a sound request with the right trace meanwhile, refuse by a named status, count what it
refuses, log no error, and not grow.
"""

import itertools
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated

import typer

from benchmarks.report import Report, run
from tests.fuzz.attacks import ATTACKS
from tests.fuzz.files import READERS, attack, attack_ring
from tests.fuzz.target import GROWTH_BYTES, Target

WARM_UP_SECONDS = 15.0
"""Of each attack before memory is measured: what broken connections leave levels off in about ten."""
SERVED_SECONDS = 5.0
"""In which others must be served meanwhile."""
_SHOWN = 5
"""Failures of a kind that are printed."""


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="In all, in equal parts.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of the first example; the next has the next.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="10 minutes.")] = False,
) -> None:
    """Examples, failures, memory, and how long others waited."""
    minutes = 10.0 if full else minutes
    kinds = [*ATTACKS, "files", "ring"]
    report = Report("fuzz", {"minutes": minutes, "kinds": kinds}, seed, n=0)
    seconds = 60 * minutes / len(kinds)
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))
        try:
            for once in ATTACKS.values():
                begun = time.monotonic()
                for number in itertools.count():
                    if time.monotonic() - begun > WARM_UP_SECONDS:
                        break
                    once(target, Random(number))
            target.settled()
            with _Others(target) as others:
                for name, once in ATTACKS.items():
                    _examples(name, report, seconds, partial(once, target))
            report.figures["grown_bytes"] = target.check()
            report.figures["refused"] = target.faults
            report.figures["others_served"] = others.served
            report.figures["others_waited_seconds"] = others.waited
            report.must["others_served"] = (">=", 1)
        finally:
            target.close()
        _examples("files", report, seconds, lambda draw: attack(draw.choice(READERS), Path(folder), draw))
    _examples("ring", report, seconds, attack_ring)
    report.must |= {"grown_bytes": ("<=", GROWTH_BYTES), "others_waited_seconds": ("<=", SERVED_SECONDS)}
    print(
        f"{report.figures['refused']:,.0f} summaries were refused by name and counted; memory "
        f"{report.figures['grown_bytes'] / (1 << 20):+.1f} MiB; a sound request took at most "
        f"{report.figures['others_waited_seconds']:.2f} s"
    )
    report.finish()


class _Others(threading.Thread):
    """Sound requests meanwhile, one after the other; what one of them meets is raised at the end.

    Attributes:
        served: how many. waited: seconds of the slowest.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(daemon=True)
        self.served = 0
        self.waited = 0.0
        self._target = target
        self._over = threading.Event()
        self._error: Exception | None = None

    def run(self) -> None:
        """Until it is over."""
        try:
            while not self._over.wait(0.5):
                self.waited = max(self.waited, self._target.serves())
                self.served += 1
        except Exception as error:
            self._error = error

    def __enter__(self) -> "_Others":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        if self._error is not None:
            raise self._error


def _examples(name: str, report: Report, seconds: float, once: Callable[[Random], object]) -> None:
    """Examples of one kind for so long."""
    begun, count, failed = time.monotonic(), 0, 0
    while time.monotonic() - begun < seconds:
        seed = report.seed + count
        count += 1
        try:
            once(Random(seed))
        except Exception as error:
            failed += 1
            if failed <= _SHOWN:
                print(f"{name}, seed {seed}: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
    report.n += count
    report.figures |= {f"{name}/examples": count, f"{name}/failed": failed}
    report.must[f"{name}/failed"] = ("<=", 0)
    print(f"{name}: {count:,} examples, {failed} failed")


if __name__ == "__main__":
    run(main)
