"""Calls that run, and whether whoever made them may still: a token that is taken back ends its streams."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stream_monitor.monitor.access.book import NotPermitted, NotRecognised
from stream_monitor.monitor.access.rights import Principal


class Revoked(Exception):
    """Whoever made the call may not make it any more. `known`: it is still somebody, with other rights than before."""

    def __init__(self, known: bool) -> None:
        super().__init__("your rights changed; connect again" if known else "your credential was taken back")
        self.known = known


@dataclass(eq=False, slots=True)
class _Call:
    principal: Principal
    again: Callable[[], Principal]
    task: asyncio.Task[object]
    revoked: Revoked | None = None


class Standing:
    """All calls of a process, gRPC and HTTP."""

    def __init__(self) -> None:
        self._calls: set[_Call] = set()

    @contextlib.contextmanager
    def holding(self, principal: Principal, again: Callable[[], Principal]) -> Iterator[None]:
        """The present task makes a call on behalf of `principal`; `again` recognises it anew. Raises Revoked."""
        task = asyncio.current_task()
        assert task is not None
        call = _Call(principal, again, task)
        self._calls.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if call.revoked is None:
                raise
            task.uncancel()
            raise call.revoked from None
        finally:
            self._calls.discard(call)

    def check(self) -> None:
        """End the calls of those who are not who they were, or have other rights."""
        for call in list(self._calls):
            try:
                if call.again() == call.principal:
                    continue
                call.revoked = Revoked(known=True)
            except NotPermitted:
                call.revoked = Revoked(known=True)
            except NotRecognised:
                call.revoked = Revoked(known=False)
            call.task.cancel()
