"""A trace with its arrays as numpy has them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream_monitor.v1alpha1 import monitor_pb2


@dataclass(frozen=True)
class Entries:
    """A matrix in coordinate form: query sentence `row[i]` gave `share[i]` of its mass to sentence `column[i]`.

    Attributes:
        row, column: uint32 [n]. share: float32 [n].
    """

    row: NDArray[np.uint32]
    column: NDArray[np.uint32]
    share: NDArray[np.float32]

    def dense(self, size: int) -> NDArray[np.float32]:
        """float32 [size, size], zero where nothing was captured."""
        matrix = np.zeros((size, size), np.float32)
        matrix[self.row, self.column] = self.share
        return matrix


@dataclass(frozen=True)
class HeadEntries(Entries):
    """The same by head: entry i is of head `Trace.heads[head[i]]`. head: uint8 [n]."""

    head: NDArray[np.uint8]


@dataclass(frozen=True)
class Trace:
    """One request; `GetTraceResponse` in `monitor.proto` says what each field means.

    Attributes:
        message: as it came.
        matrix: what each sentence gave to each earlier one.
        unobserved_share, vertical_score, receiver_score, corrected_score: float32 [sentences], NaN where there is none.
        captured_rows: uint32 [sentences].
        row_positions, row_attempts: uint32 [rows].
        by_head: the matrix of every head; empty unless asked for.
    """

    message: monitor_pb2.GetTraceResponse
    matrix: Entries
    unobserved_share: NDArray[np.float32]
    captured_rows: NDArray[np.uint32]
    vertical_score: NDArray[np.float32]
    receiver_score: NDArray[np.float32]
    corrected_score: NDArray[np.float32]
    row_positions: NDArray[np.uint32]
    row_attempts: NDArray[np.uint32]
    by_head: HeadEntries

    @classmethod
    def of(cls, message: monitor_pb2.GetTraceResponse) -> "Trace":
        """The arrays of a message, without copying them."""
        return cls(
            message,
            Entries(_uint32(message.matrix_row), _uint32(message.matrix_column), _float32(message.matrix_share)),
            _float32(message.unobserved_share),
            _uint32(message.captured_rows),
            _float32(message.vertical_score),
            _float32(message.receiver_score),
            _float32(message.corrected_score),
            _uint32(message.row_positions),
            _uint32(message.row_attempts),
            HeadEntries(
                _uint32(message.head_row),
                _uint32(message.head_column),
                _float32(message.head_share),
                np.frombuffer(message.head_index, np.uint8),
            ),
        )

    @property
    def info(self) -> monitor_pb2.RequestInfo:
        """The request in short."""
        return self.message.info

    @property
    def sentences(self) -> Sequence[monitor_pb2.Sentence]:
        """Prompt and output, in order."""
        return self.message.sentences

    @property
    def events(self) -> Sequence[monitor_pb2.Event]:
        """The newest 64 findings, oldest first."""
        return self.message.events

    @property
    def heads(self) -> Sequence[monitor_pb2.TraceHead]:
        """Heads that are told apart."""
        return self.message.heads


def _uint32(raw: bytes) -> NDArray[np.uint32]:
    return np.frombuffer(raw, "<u4")


def _float32(raw: bytes) -> NDArray[np.float32]:
    return np.frombuffer(raw, "<f4")
