"""Ending tasks that work with the broker's library: it may take a cancellation for one of its own timeouts."""

import asyncio
from typing import Any

AGAIN_SECONDS = 1.0


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until each has ended, however it did."""
    running = set(tasks)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)
