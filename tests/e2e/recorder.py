"""An IngestService that keeps every summary it is sent: what a monitor would see, to compare with the truth."""

from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc, summary_pb2


class Recorder(ingest_pb2_grpc.IngestServiceServicer):
    """Listens on `address` from construction to `stop`."""

    def __init__(self, address: str) -> None:
        self.summaries: list[summary_pb2.StepSummary] = []
        self._server = grpc.server(
            futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
        )
        ingest_pb2_grpc.add_IngestServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(address)
        self._server.start()

    def Publish(
        self, request_iterator: Iterator[ingest_pb2.PublishRequest], context: grpc.ServicerContext
    ) -> Iterator[ingest_pb2.PublishResponse]:
        for request in request_iterator:
            self.summaries.append(request.summary)
            yield ingest_pb2.PublishResponse(
                sequence=request.summary.sequence, outcome=ingest_pb2.PUBLISH_OUTCOME_ACCEPTED
            )

    def stop(self) -> None:
        """End every call and free the address."""
        self._server.stop(None).wait()


@dataclass(frozen=True)
class CapturedRow:
    """One row, unpacked: arrays [L, H, ...] as `summary.proto` describes them, masses as shares."""

    request_id: str
    position: int
    attempt: int
    phase: int
    layers: tuple[int, ...]
    block_ids: NDArray[np.int64]
    block_share: NDArray[np.float64]
    block_strongest: NDArray[np.uint8]
    forced_share: NDArray[np.float64]
    unobserved_share: NDArray[np.float64]
    sink_share: NDArray[np.float64]
    total_lse: NDArray[np.float32]
    keys_read: NDArray[np.float32]
    geometry: summary_pb2.BlockGeometry

    def forced_ids(self) -> list[int]:
        """Ids of the forced blocks in the order of `forced_share`, -1 where absent."""
        blocks = self.position // self.geometry.block_size + 1
        sinks = self.geometry.sink_blocks
        return [b if b < blocks else -1 for b in range(sinks)] + [
            b if b >= sinks else -1 for b in range(blocks - self.geometry.recent_blocks, blocks)
        ]

    def distribution(self) -> NDArray[np.float64]:
        """Share of each block of the context, [L, H, blocks]; blocks that were not kept are 0."""
        blocks = self.position // self.geometry.block_size + 1
        layers, heads, _ = self.block_ids.shape
        result = np.zeros((layers, heads, blocks + 1))  # the last column takes the padding
        index = np.where(self.block_ids == 0xFFFFFFFF, blocks, self.block_ids)
        np.put_along_axis(result, index, self.block_share, axis=-1)
        for slot, block in enumerate(self.forced_ids()):
            if block >= 0:
                result[:, :, block] = self.forced_share[:, :, slot]
        return result[:, :, :blocks]


def rows_of(summaries: list[summary_pb2.StepSummary]) -> list[CapturedRow]:
    """Every captured row, in the order of arrival."""
    return [row for summary in summaries if summary.HasField("rows") for row in _unpack(summary)]


def _unpack(summary: summary_pb2.StepSummary) -> list[CapturedRow]:
    rows, engine = summary.rows, summary.engine
    lead = (rows.count, len(engine.layers), len(engine.query_heads))
    kept, forced = engine.geometry.top_k, engine.geometry.sink_blocks + engine.geometry.recent_blocks

    def array(data: bytes, dtype: str, *shape: int) -> NDArray[np.generic]:
        return np.frombuffer(data, dtype).reshape(shape)

    with np.errstate(under="ignore"):
        share = np.exp(array(rows.block_log_share, "<f2", *lead, kept).astype(np.float64))
        forced_share = np.exp(array(rows.forced_log_share, "<f2", *lead, forced).astype(np.float64))
        unobserved = np.exp(array(rows.unobserved_log_share, "<f2", *lead).astype(np.float64))
        sinks = np.zeros(lead)
        if rows.learned_sink_log_share:
            sinks = np.exp(array(rows.learned_sink_log_share, "<f2", *lead).astype(np.float64))
    ids = array(rows.narrow_block_ids or rows.block_ids, "<u2" if rows.narrow_block_ids else "<u4", *lead, kept)
    none = np.iinfo(ids.dtype).max
    ids = np.where(ids == none, 0xFFFFFFFF, ids.astype(np.int64))
    columns = zip(
        rows.request_ids,
        array(rows.positions, "<u4", rows.count),
        array(rows.attempts, "<u4", rows.count),
        rows.phases,
        ids,
        share,
        array(rows.block_strongest, "u1", *lead, kept),
        forced_share,
        unobserved,
        sinks,
        array(rows.total_lse, "<f4", *lead),
        array(rows.keys_read, "<f4", *lead[:2]),
        strict=True,
    )
    return [
        CapturedRow(request_id, int(position), int(attempt), int(phase), tuple(engine.layers), *rest, engine.geometry)
        for request_id, position, attempt, phase, *rest in columns
    ]
