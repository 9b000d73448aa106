"""IngestService: streams of summaries; what breaks the contract ends its own stream and no other."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

import grpc

from stream_monitor.monitor.access import rights
from stream_monitor.monitor.intake import Intake, Stream
from stream_monitor.v1alpha1 import ingest_pb2

SERVICE = ingest_pb2.DESCRIPTOR.services_by_name["IngestService"].full_name
Context = grpc.aio.ServicerContext[bytes, ingest_pb2.PublishResponse]

BATCH_SECONDS = 0.01
"""What arrives in this time is taken in together. A message that comes later than this after those before waits for
none."""
MOST_BYTES, MOST_MESSAGES = 1 << 20, 64
"""Of one stream that wait to be taken in; then they are at once, and nothing more is read meanwhile."""


@dataclass(eq=False)
class _Publisher:
    """One stream: what came, and what is to be answered.

    Attributes:
        broken: an exception of ours, which ends the stream.
        ended: nothing more will come.
        changed: whoever writes answers has something to do. room: more may be read.
    """

    said: Stream
    waiting: list[bytes] = field(default_factory=list)
    bytes: int = 0
    answers: deque[ingest_pb2.PublishResponse] = field(default_factory=deque)
    broken: Exception | None = None
    ended: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)


class Ingest:
    """Reads all streams, hands what came to the intake, and writes its answers."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self._streams: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._ready: dict[_Publisher, None] = {}
        self._due: asyncio.TimerHandle | None = None
        self._taken_at = 0.0

    def handler(self) -> grpc.GenericRpcHandler:
        """The service for a grpc.aio server. Requests stay bytes, so that what cannot be parsed is ours to answer."""
        publish: grpc.RpcMethodHandler[bytes, ingest_pb2.PublishResponse] = grpc.stream_stream_rpc_method_handler(
            self._publish, response_serializer=ingest_pb2.PublishResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Publish": publish})

    def stop(self) -> None:
        """End all streams with UNAVAILABLE; what is not acknowledged will be sent again."""
        self._stopping = True
        for stream in self._streams:
            stream.cancel()

    async def _publish(self, _: object, context: Context) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        publisher = _Publisher(Stream(rights.current().publishes_for))
        reading = asyncio.create_task(self._read(context, publisher))
        try:
            await self._answer(context, publisher)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the monitor is stopping")
        finally:
            reading.cancel()
            if publisher.waiting and not self._stopping:
                # What came whole counts, however the stream ended.
                self._take()
            self._streams.discard(task)
            self._ready.pop(publisher, None)
            if (rank := publisher.said.rank) is not None:
                rank.streams -= 1
                rank.left_at = time.monotonic()

    async def _read(self, context: Context, publisher: _Publisher) -> None:
        while True:
            try:
                raw = await context.read()
            except Exception as error:
                publisher.broken = error
                publisher.changed.set()
                return
            if not isinstance(raw, bytes):  # grpc.aio.EOF
                publisher.ended = True
                publisher.changed.set()
                return
            publisher.waiting.append(raw)
            publisher.bytes += len(raw)
            self._ready[publisher] = None
            if publisher.bytes >= MOST_BYTES or len(publisher.waiting) >= MOST_MESSAGES:
                self._take()
            elif self._due is None:
                loop = asyncio.get_running_loop()
                self._due = loop.call_at(max(loop.time(), self._taken_at + BATCH_SECONDS), self._take)
            # Answers that nobody reads must not pile up.
            while len(publisher.answers) >= MOST_MESSAGES:
                publisher.room.clear()
                await publisher.room.wait()

    def _take(self) -> None:
        """Take in what waits, of all streams."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        ready, self._ready = self._ready, {}
        for publisher in ready:
            messages, publisher.waiting, publisher.bytes = publisher.waiting, [], 0
            if publisher.said.fault is None and publisher.broken is None:
                try:
                    publisher.answers += self.intake.take(messages, publisher.said)
                except Exception as error:
                    publisher.broken = error
        try:
            self.intake.score()
        except Exception as error:
            for publisher in ready:
                publisher.broken = publisher.broken or error
        for publisher in ready:
            publisher.changed.set()
        self._taken_at = asyncio.get_running_loop().time()

    async def _answer(self, context: Context, publisher: _Publisher) -> None:
        """Write answers until the stream ends."""
        while True:
            await publisher.changed.wait()
            publisher.changed.clear()
            while publisher.answers:
                await context.write(publisher.answers.popleft())
            publisher.room.set()
            if publisher.broken is not None:
                raise publisher.broken
            if (fault := publisher.said.fault) is not None:
                await context.abort(fault.status, str(fault))
            if publisher.ended and not publisher.waiting:
                return
