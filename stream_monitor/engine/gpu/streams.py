"""Streams and events, as the GPU side uses them, and a stand-in for machines without a GPU.

The side stream has the priority of the engine's streams, there being none below it (CUDA's default is the lowest).
What keeps a search from taking the GPU from the engine is the bound of its grid.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream's work."""

    def record(self) -> None:
        """Set it at the end of what the current stream has been given so far."""

    def wait(self) -> None:
        """The current stream goes on only when it is reached; the host does not wait."""

    def synchronize(self) -> None:
        """The calling thread sleeps until it is reached."""


class Streams(Protocol):
    """The engine's stream is the current one on the runner thread; searches have their own."""

    def event(self) -> Any: ...

    def side(self) -> AbstractContextManager[Any]:
        """The side stream as the current one of this thread."""


class CudaStreams:
    """A side stream of the engine's device."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)

    def event(self) -> Any:
        """Blocking: a thread that waits for it sleeps instead of polling the driver."""
        return torch.cuda.Event(blocking=True)

    def side(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._side)


class _NoEvent:
    def record(self) -> None: ...

    def wait(self) -> None: ...

    def synchronize(self) -> None: ...


class InlineStreams:
    """The stand-in: tensors on the CPU, every kernel done when its launch returns; nothing is left to order."""

    def event(self) -> Any:
        return _NoEvent()

    def side(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()


def streams_of(device: torch.device) -> Streams:
    """For a CUDA device, or the stand-in where Triton is interpreted."""
    return CudaStreams(device) if device.type == "cuda" else InlineStreams()
