"""A cursor of one process on another that has not read as far, or that reads its stream anew."""

import asyncio

import pytest

from stream_monitor.monitor.events import CursorGone, EventLog
from stream_monitor.v1alpha1 import monitor_pb2

SHIFT = monitor_pb2.EVENT_KIND_ANCHOR_SHIFT


class Shelf:
    """A store that holds nothing that is not in memory."""

    def keep(self, sequence: int, event: monitor_pb2.Event) -> None:
        raise AssertionError("the stream gives out the numbers")


def process(epoch: str = "stream", *sequences: int) -> EventLog:
    log = EventLog(100, 100, 10, shared=True)
    log.stored_in(Shelf(), 0)  # type: ignore[arg-type]
    log.opened(epoch, 0, 0)
    for sequence in sequences:
        log.append(sequence, finding(sequence))
    return log


def finding(sequence: int) -> monitor_pb2.Event:
    return monitor_pb2.Event(kind=SHIFT, wall_time_ns=sequence)


def everything(_: monitor_pb2.Event) -> bool:
    return True


def test_a_process_that_is_behind_gives_what_comes_after_the_cursor() -> None:
    ahead, behind = process("stream", 3, 5, 9), process("stream", 3)
    subscriber, again = behind.subscribe(everything, ahead.cursor(5))
    assert again == ahead.cursor(5)
    for sequence in (5, 9):
        behind.append(sequence, finding(sequence))

    async def read() -> list[int]:
        found = await subscriber.next()
        assert found is not None
        return [found[0], found[2], subscriber.waiting]

    assert asyncio.run(read()) == [9, 0, 0]


def test_what_is_read_anew_is_not_handed_out_again() -> None:
    log = process("stream", 3, 5)
    subscriber, _ = log.subscribe(everything, log.cursor(3))
    for sequence in (3, 5, 9):
        log.append(sequence, finding(sequence))

    async def read() -> list[int]:
        return [(await subscriber.next() or (0,))[0] for _ in range(2)]

    assert asyncio.run(read()) == [5, 9]


def test_a_cursor_of_another_stream_of_that_name_is_refused() -> None:
    log = process("stream", 3, 5)
    before = log.cursor(3)
    log.restart()
    log.opened("another", 0, 0)
    with pytest.raises(CursorGone):
        log.subscribe(everything, before)
    log.append(1, finding(1))
    subscriber, _ = log.subscribe(everything, log.cursor(0))
    assert asyncio.run(subscriber.next()) == (1, finding(1), 0)
