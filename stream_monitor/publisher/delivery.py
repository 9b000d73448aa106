"""The stream to the monitor: sends the backlog, settles it by the answers, and begins again when the stream ends."""

import asyncio
import contextlib
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from stream_monitor.publisher.backlog import Backlog
from stream_monitor.publisher.convert import engine_message, summary_message
from stream_monitor.publisher.log import Log
from stream_monitor.records import EngineInfo
from stream_monitor.replaced import Mark
from stream_monitor.target import Target, TargetError
from stream_monitor.v1alpha1 import ingest_pb2
from stream_monitor.v1alpha1.ingest_pb2_grpc import IngestServiceStub

if TYPE_CHECKING:
    from stream_monitor.v1alpha1.ingest_pb2_grpc import IngestServiceAsyncStub

    Call = grpc.aio.StreamStreamCall[ingest_pb2.PublishRequest, ingest_pb2.PublishResponse]

FIRST_WAIT, LONGEST_WAIT = 0.1, 2.0
"""Seconds between attempts; doubled after each that got no answer."""
ANSWER_SECONDS = 30.0
"""A monitor that answers nothing for so long while summaries are in flight is taken for hung: connect anew."""
_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", int(FIRST_WAIT * 1000)),
    ("grpc.min_reconnect_backoff_ms", int(FIRST_WAIT * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(LONGEST_WAIT * 1000)),
    ("grpc.use_local_subchannel_pool", 1),
    # A monitor whose host vanished without a word is found out while nothing is in flight, too.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # An http_proxy in the worker's environment is meant for model downloads, not for the monitor next door.
    ("grpc.enable_http_proxy", 0),
]
_CONTRACT = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
}
"""How the monitor ends the stream because of one message (`ingest.proto`)."""
_FAULT = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS}
"""How a monitor that stumbles over one message may end it; the network can, too."""
_MOST_FAULTS = 3


class Delivery:
    """The sending side; `wake` is set by whoever adds to the backlog."""

    def __init__(self, backlog: Backlog, info: EngineInfo, target: Target, log: Log) -> None:
        self._backlog = backlog
        self._engine = engine_message(info)
        self._target = target
        self._address = target.address
        self._log = log
        self._answers = 0  # of the present stream
        self._deadline = asyncio.timeout(None)
        self._finishing = False
        self.wake = asyncio.Event()

    def finish(self) -> None:
        """Let `run` return once everything is answered."""
        self._finishing = True
        self.wake.set()

    async def run(self) -> None:
        """Deliver until `finish`, for ever otherwise. Raises only asyncio.CancelledError."""
        wait = FIRST_WAIT
        while not (self._finishing and self._backlog.empty):
            self._answers = 0
            try:
                status, details = await self._connect_and_send()
            except TargetError as error:
                self._log.say(str(error), f"cannot connect, will keep trying: {error}")
            else:
                if status is not grpc.StatusCode.OK:
                    # Another reason than the one before is news.
                    self._log.say(
                        f"ended {status.name}",
                        f"stream to {self._address} ended, will begin again: {status.name} {details}",
                    )
            wait = FIRST_WAIT if self._answers else min(wait * 2, LONGEST_WAIT)
            await asyncio.sleep(0 if self._finishing and self._backlog.empty else wait)

    async def _connect_and_send(self) -> tuple[grpc.StatusCode, str]:
        """One stream over one connection, with what the target's files hold by now; its status. Raises TargetError."""
        while not self._target.check_folder():
            # Not left to gRPC, which would take whoever makes it first.
            self._say_unreachable()
            await asyncio.sleep(LONGEST_WAIT)
        mark = self._target.mark()
        credentials = self._target.credentials()
        if credentials is None:
            opened = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        else:
            opened = grpc.aio.secure_channel(self._address, credentials, options=_OPTIONS)
        async with opened as channel:
            await self._connected(channel, mark)
            # It may have been away for as long as that took.
            self._target.check_folder()
            status, details = await self._one_stream(IngestServiceStub(channel))
            self._judge(status)
            self._backlog.rewind()
        return status, details

    async def _connected(self, channel: grpc.aio.Channel, mark: Mark) -> None:
        """Until it is, or until certificates were replaced without which it might never be."""
        ready = asyncio.ensure_future(channel.channel_ready())
        try:
            while not (await asyncio.wait((ready,), timeout=LONGEST_WAIT))[0] and self._target.mark() == mark:
                self._say_unreachable(f" ({await _failure(channel)})" if self._target.ca else "")
        finally:
            ready.cancel()

    def _say_unreachable(self, reason: str = "") -> None:
        self._log.say("unreachable", f"monitor at {self._address} unreachable{reason}, will keep trying")

    async def _one_stream(self, stub: "IngestServiceAsyncStub") -> tuple[grpc.StatusCode, str]:
        """Send and settle until the stream ends; return its status. Raises TargetError."""
        call = stub.Publish(metadata=self._target.metadata())
        sender = asyncio.ensure_future(self._send(call))
        try:
            async with asyncio.timeout(None) as self._deadline:
                async for response in call:
                    if not self._settle(response):
                        return grpc.StatusCode.ABORTED, f"answer to {response.sequence} came out of order"
            return await call.code(), await call.details() or ""
        except TimeoutError:
            return grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer for {ANSWER_SECONDS:.0f} s"
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        finally:
            call.cancel()
            sender.cancel()
            await asyncio.wait((sender,))

    async def _send(self, call: "Call") -> None:
        # Where the stream has ended, write fails; the receiving side learns the status.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                self.wake.clear()
                while (ready := self._backlog.next()) is not None:
                    entry, ledger = ready
                    if self._backlog.in_flight == 1:
                        self._expect_answer()
                    summary = summary_message(self._engine, entry.sequence, entry.record, ledger)
                    await call.write(ingest_pb2.PublishRequest(summary=summary))
                if self._finishing and self._backlog.empty:
                    await call.done_writing()
                    return
                await self.wake.wait()

    def _expect_answer(self) -> None:
        waiting = self._backlog.in_flight > 0
        self._deadline.reschedule(asyncio.get_running_loop().time() + ANSWER_SECONDS if waiting else None)

    def _settle(self, response: ingest_pb2.PublishResponse) -> bool:
        """Take in one answer; False if it is not the answer to the oldest unanswered summary."""
        entry = self._backlog.unanswered
        if entry is None or entry.sequence != response.sequence:
            return False
        if response.outcome == ingest_pb2.PUBLISH_OUTCOME_REFUSED:
            self._backlog.settle(refused=response.reason)
            self._log.say("refused", f"monitor refuses summaries: {response.reason}")
        else:
            self._backlog.settle()
        self._answers += 1
        self._expect_answer()
        self.wake.set()
        return True

    def _judge(self, status: grpc.StatusCode) -> None:
        """Refuse the summary for which the monitor ended the stream, so that it is not sent for ever.

        It is known for certain only when no other was in flight: a limit of the transport can end the stream before
        earlier answers are through. So with several in flight, send them again one at a time.
        """
        entry = self._backlog.unanswered
        if entry is None or status not in _CONTRACT | _FAULT:
            return
        if self._backlog.in_flight > 1:
            self._backlog.careful = self._backlog.in_flight
            return
        entry.failures += 1
        if status in _CONTRACT or entry.failures >= _MOST_FAULTS:
            self._backlog.settle(refused=f"monitor_{status.name.lower()}")
            self._log.say("fault", f"monitor cannot take summary {entry.sequence}: {status.name}")


async def _failure(channel: grpc.aio.Channel) -> str:
    """Why a channel does not connect: only a call is told."""
    try:
        await HealthStub(channel).Check(HealthCheckRequest(), timeout=LONGEST_WAIT)
    except grpc.aio.AioRpcError as error:
        return error.details() or error.code().name
    return "it just did"
