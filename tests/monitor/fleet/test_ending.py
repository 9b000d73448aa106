"""Tasks end although a library swallows what cancels them."""

import asyncio

import pytest

from stream_monitor.monitor.fleet import ending


def test_a_task_whose_cancellation_is_taken_for_a_timeout_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "AGAIN_SECONDS", 0.01)
    swallowed = []

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed.append(1)
                if len(swallowed) == 3:
                    raise

    async def run() -> None:
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        await asyncio.wait_for(ending.end(task), 20)
        assert task.cancelled()

    asyncio.run(run())
    assert len(swallowed) == 3
