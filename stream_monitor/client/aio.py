"""The client for asyncio; `blocking.py` describes what each method takes."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import grpc

from stream_monitor.client.connection import (
    DEADLINE_SECONDS,
    PAGE,
    Link,
    delete_request,
    list_request,
    refuse,
    trace_request,
)
from stream_monitor.client.subscription import Notify, Received, Subscription
from stream_monitor.client.trace import Trace
from stream_monitor.target import Target
from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc


class AsyncMonitor:
    """A running monitor, used from one event loop.

    >>> from stream_monitor.client import AsyncMonitor
    >>> async def main() -> None:
    ...     async with AsyncMonitor("127.0.0.1:9750") as monitor:
    ...         async for received in monitor.subscribe(kinds=["anchor_shift"], last=10):
    ...             print(received.event.external_id)
    ...             break
    >>> import asyncio
    >>> asyncio.run(main())
    chatcmpl-my-req-1

    Args:
        target: address, host:port or unix:/path, or a Target, which names files of certificates and token too.
        credentials: of a TLS connection, where they are not in files.
        token: sent as a bearer token with every call, where it is not in a file.

    Raises:
        TargetError: the monitor would be spoken to in the clear beyond this host, or a file cannot be read.
    """

    def __init__(
        self,
        target: str | Target = "127.0.0.1:9750",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
    ) -> None:
        self._link = Link(target, credentials, token, grpc.aio.insecure_channel, grpc.aio.secure_channel)
        self.target = self._link.target.address
        self._closed = False

    async def __aenter__(self) -> "AsyncMonitor":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; subscriptions that are open end."""
        self._closed = True
        for channel in self._link.channels:
            await channel.close()

    def subscribe(
        self,
        *,
        model_names: Sequence[str] = (),
        engines: Sequence[str] = (),
        request_ids: Sequence[str] = (),
        kinds: Sequence[str] = (),
        minimum_severity: str = "",
        cursor: str = "",
        last: int = 0,
        notify: Notify | None = None,
    ) -> AsyncIterator[Received]:
        """As `Monitor.subscribe`."""
        asked = Subscription(
            self.target, model_names, engines, request_ids, kinds, minimum_severity, cursor, last, notify
        )
        return self._events(asked)

    async def _events(self, asked: Subscription) -> AsyncIterator[Received]:
        while not self._closed:
            call = self._service().Subscribe(asked.request, metadata=self._link.metadata())
            try:
                async for response in call:
                    if (received := asked.heard(response)) is not None:
                        yield received
                wait = asked.ended()
            except grpc.aio.AioRpcError as error:
                if self._closed:
                    return
                wait = asked.failed(error, self._link.renewed())
            finally:
                call.cancel()
            await asyncio.sleep(wait)

    async def get_trace(
        self, request_id: str, *, engine_instance: str = "", sample_index: int | None = None, with_heads: bool = False
    ) -> Trace:
        """As `Monitor.get_trace`."""
        asked = trace_request(request_id, engine_instance, sample_index, with_heads)
        with self._asking():
            return Trace.of(
                await self._service().GetTrace(asked, timeout=DEADLINE_SECONDS, metadata=self._link.metadata())
            )

    async def list_requests(
        self, *, request_id: str = "", model_name: str = "", engine: str = "", page_size: int = PAGE
    ) -> AsyncIterator[monitor_pb2.RequestInfo]:
        """As `Monitor.list_requests`."""
        token = ""
        while True:
            asked = list_request(request_id, model_name, engine, page_size, token)
            with self._asking():
                page = await self._service().ListRequests(
                    asked, timeout=DEADLINE_SECONDS, metadata=self._link.metadata()
                )
            for info in page.requests:
                yield info
            token = page.next_page_token
            if not token:
                return

    async def delete_request(
        self, request_id: str, *, engine_instance: str = "", sample_index: int | None = None, every: bool = False
    ) -> list[monitor_pb2.TraceKey]:
        """As `Monitor.delete_request`."""
        asked = delete_request(request_id, engine_instance, sample_index, every)
        with self._asking():
            response = await self._service().DeleteRequest(
                asked, timeout=2 * DEADLINE_SECONDS, metadata=self._link.metadata()
            )
        return list(response.keys)

    def _service(self) -> "monitor_pb2_grpc.MonitorServiceAsyncStub":
        return monitor_pb2_grpc.MonitorServiceStub(self._link.channel())

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            refuse(self.target, error)
