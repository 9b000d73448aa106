"""The client that blocks."""

import time
from collections.abc import Iterator, Sequence
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


class Monitor:
    """A running monitor; may be used from several threads.

    >>> from stream_monitor.client import Monitor
    >>> with Monitor("127.0.0.1:9750") as monitor:
    ...     for received in monitor.subscribe(kinds=["anchor_shift"], last=10):
    ...         print(received.event.summary, received.cursor)
    ...         break
    at sentence 22 the anchors moved from sentence 0 to sentence 5 (divergence ...) ...

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
        self._link = Link(target, credentials, token, grpc.insecure_channel, grpc.secure_channel)
        self.target = self._link.target.address
        self._closed = False

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; subscriptions that are open end."""
        self._closed = True
        for channel in self._link.channels:
            channel.close()

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
    ) -> Iterator[Received]:
        """Events as they come, over broken connections and restarts of the monitor, until the iterator is closed.

        Args:
            model_names, engines, request_ids: only these; empty for all.
            kinds: such as `anchor_shift`; empty for all findings.
            minimum_severity: `info`, `warning` or `critical`.
            cursor: of an event received earlier: goes on after it. Empty: from now on.
            last: without a cursor, begin with as many findings that the monitor holds.
            notify: told, in a sentence, that the connection broke or that events may be missing; the latter is in the
                next `Received` too.

        Raises:
            ValueError: no such kind or severity.
            MonitorError: the monitor refuses for good. That it cannot be reached is not an error: it is tried again.
        """
        asked = Subscription(
            self.target, model_names, engines, request_ids, kinds, minimum_severity, cursor, last, notify
        )
        return self._events(asked)

    def _events(self, asked: Subscription) -> Iterator[Received]:
        while not self._closed:
            try:
                call = self._service().Subscribe(asked.request, metadata=self._link.metadata())
                try:
                    for response in call:
                        if (received := asked.heard(response)) is not None:
                            yield received
                finally:
                    call.cancel()
                wait = asked.ended()
            except ValueError:  # gRPC's word for a closed channel.
                if not self._closed:
                    raise
                return
            except grpc.RpcError as error:
                if self._closed:
                    return
                wait = asked.failed(error, self._link.renewed())
            time.sleep(wait)

    def get_trace(
        self, request_id: str, *, engine_instance: str = "", sample_index: int | None = None, with_heads: bool = False
    ) -> Trace:
        """One request's trace. Raises MonitorError, with NOT_FOUND or, if the id is ambiguous, FAILED_PRECONDITION.

        >>> from stream_monitor.client import Monitor
        >>> with Monitor("127.0.0.1:9750") as monitor:
        ...     trace = monitor.get_trace("my-req-1")
        >>> trace.matrix.dense(len(trace.sentences)).shape
        (30, 30)
        """
        asked = trace_request(request_id, engine_instance, sample_index, with_heads)
        with self._asking():
            return Trace.of(self._service().GetTrace(asked, timeout=DEADLINE_SECONDS, metadata=self._link.metadata()))

    def list_requests(
        self, *, request_id: str = "", model_name: str = "", engine: str = "", page_size: int = PAGE
    ) -> Iterator[monitor_pb2.RequestInfo]:
        """Requests the monitor holds, newest first, fetched page by page as they are taken. Raises MonitorError.

        >>> from stream_monitor.client import Monitor
        >>> with Monitor("127.0.0.1:9750") as monitor:
        ...     print([info.external_id for info in monitor.list_requests() if info.events])
        ['chatcmpl-my-req-1']
        """
        token = ""
        while True:
            asked = list_request(request_id, model_name, engine, page_size, token)
            with self._asking():
                page = self._service().ListRequests(asked, timeout=DEADLINE_SECONDS, metadata=self._link.metadata())
            yield from page.requests
            token = page.next_page_token
            if not token:
                return

    def delete_request(
        self, request_id: str, *, engine_instance: str = "", sample_index: int | None = None, every: bool = False
    ) -> list[monitor_pb2.TraceKey]:
        """Removes a request from the monitor's memory and store for good; what was removed.

        `every` removes all requests that the id and the other arguments leave, such as all samples of one request.
        Raises MonitorError, with UNAVAILABLE if the store cannot be written now.

        >>> from stream_monitor.client import Monitor
        >>> with Monitor("127.0.0.1:9750") as monitor:
        ...     print([key.request_id for key in monitor.delete_request("my-req-1")])
        ['chatcmpl-my-req-1-aee6d49e']
        """
        asked = delete_request(request_id, engine_instance, sample_index, every)
        with self._asking():
            response = self._service().DeleteRequest(
                asked, timeout=2 * DEADLINE_SECONDS, metadata=self._link.metadata()
            )
        return list(response.keys)

    def _service(self) -> monitor_pb2_grpc.MonitorServiceStub:
        return monitor_pb2_grpc.MonitorServiceStub(self._link.channel())

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            refuse(self.target, error)
