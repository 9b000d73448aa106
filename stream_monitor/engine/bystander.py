"""The device of a pipeline rank that watches none of its layers: it tells of requests and tokens, and keeps no rows."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_kernels.search import BlockSummary, SearchConfig
from stream_monitor.engine.compat.schedule import ScheduledStep
from stream_monitor.engine.device import StepSlot
from stream_monitor.records import Audit


class NoSearch:
    """`RowSearch` that is never given a row."""

    summary_bytes = 0

    def __init__(self) -> None:
        self.summary = BlockSummary.allocate(0, 0, 0, SearchConfig())

    def run(self, slot: Any) -> NDArray[np.uint8]:
        """Nothing to search."""
        return np.zeros(0, np.uint8)

    def audit(self, slot: Any, layer: int, row: int, head: int) -> Audit | None:
        """Nothing to judge."""
        return None

    def set_logit_weights(self, scales: list[float], sinks: list[Any]) -> None:
        """No layer, no sinks."""


class NoDevice:
    """`Device` without a slot, so that no row is ever taken."""

    def __init__(self) -> None:
        self.slots: list[StepSlot] = []
        self.search = NoSearch()
        self.waits = 0

    def follow(self, step: ScheduledStep) -> None:
        """No row whose blocks matter."""

    def take_tap_ns(self) -> int:
        """No taps."""
        return 0

    def stop(self) -> None:
        """No taps."""
