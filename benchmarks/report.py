"""What every benchmark ends with: one JSON line, and exit status 1 where a must is missed."""

import json
import math
import os
import platform
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import typer

from stream_monitor.tracing.errors import TracingError

Must = tuple[str, float]
"""How a figure is compared, `>=` or `<=`, and with what."""

_BOOTSTRAP_DRAWS = 2000


@dataclass
class Report:
    """Figures of one run, and what they must reach.

    Attributes:
        benchmark: name of the module.
        config: what was run, JSON values only.
        seed: of the texts, keys and resamples.
        n: independent observations, said in `config` where it is not obvious.
        figures: by name; what is not finite, as there was nothing to measure it on, is not in the line.
        ci: 95% intervals of some of them.
        must: bounds of some of them; one that was not measured counts as missed.
    """

    benchmark: str
    config: dict[str, Any]
    seed: int
    n: int
    figures: dict[str, float] = field(default_factory=dict)
    ci: dict[str, tuple[float, float]] = field(default_factory=dict)
    must: dict[str, Must] = field(default_factory=dict)

    def missed(self) -> list[str]:
        """Names of the musts that do not hold."""
        return [name for name, must in self.must.items() if not _holds(self.figures.get(name, math.nan), must)]

    def content(self) -> dict[str, Any]:
        """What the JSON line says."""
        return {
            "benchmark": self.benchmark,
            "config": self.config,
            "seed": self.seed,
            "n": self.n,
            "figures": {name: _rounded(value) for name, value in self.figures.items() if math.isfinite(value)},
            "ci": {name: list(map(_rounded, ends)) for name, ends in self.ci.items() if all(map(math.isfinite, ends))},
            "must": {name: list(must) for name, must in self.must.items()},
            "pass": not self.missed(),
            "machine": machine(),
        }

    def finish(self) -> None:
        """Prints the musts that were missed, then the JSON line.

        Raises:
            typer.Exit: with code 1 if a must is missed.
        """
        missed = self.missed()
        for name in missed:
            operator, bound = self.must[name]
            print(f"missed: {name} is {self.figures.get(name)}, must be {operator} {bound}")
        print(json.dumps(self.content(), allow_nan=False), flush=True)
        if missed:
            raise typer.Exit(1)


def _holds(value: float, must: Must) -> bool:
    operator, bound = must
    return math.isfinite(value) and (value >= bound if operator == ">=" else value <= bound)


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def machine() -> dict[str, Any]:
    """The processor and the software that a figure depends on."""
    import torch

    cpu = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    found: dict[str, Any] = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def bootstrap(
    clusters: Mapping[str, Sequence[float]], seed: int, statistic: Callable[[Sequence[float]], float] = fmean
) -> tuple[float, float]:
    """95% interval of a statistic of all values, by drawing whole clusters with replacement.

    Values of one cluster (one text, say) are not independent of each other. A handful of clusters gives an interval
    that is rather too narrow.
    """
    draw = random.Random(seed)
    groups = list(clusters.values())
    drawn = []
    for _ in range(_BOOTSTRAP_DRAWS):
        drawn.append(statistic([value for group in draw.choices(groups, k=len(groups)) for value in group]))
    drawn.sort()
    return drawn[int(0.025 * len(drawn))], drawn[int(0.975 * len(drawn))]


def run(command: Callable[..., None]) -> None:
    """Runs `command` as the command line of its module; arguments it does not take end in one line and exit status 2.

    `command` raises `typer.BadParameter` or `TracingError` for what it finds wrong itself.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        status = app(standalone_mode=False)
    except Exception as error:
        # Typer's own errors have this method; their base class has no public name.
        if hasattr(error, "format_message"):
            message = error.format_message()
        elif isinstance(error, TracingError):
            message = str(error)
        else:
            raise
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status or 0)
