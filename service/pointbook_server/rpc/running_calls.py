"""The calls that have not ended, and their deadlines."""

import asyncio
import math
import time
from typing import Any

TICK_SECONDS = 0.05
"""How often calls past their deadline are looked for, and so how much later than its deadline a call may end."""


def current_task() -> asyncio.Task[Any]:
    """Return the task of the current call."""
    task = asyncio.current_task()
    assert task is not None, "gRPC runs each call in a task of its own"  # noqa: S101 - narrows the type
    return task


class RunningCalls:
    """The tasks of running calls, each cancelled at its deadline.

    One timer serves all calls: a timer for each would cost every call, and hardly any reaches its deadline.
    `grpc.aio.Server.stop` returns before handlers have cleaned up after themselves, so a stopping server waits.
    """

    def __init__(self) -> None:
        self._deadlines: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._has_timer = False

    def __len__(self) -> int:
        """Return the number of running calls."""
        return len(self._deadlines)

    def add(self, task: asyncio.Task[Any], deadline: float) -> None:
        """Add a call that may run until a time of the monotonic clock."""
        self._deadlines[task] = deadline
        if not self._has_timer:
            self._start_timer()

    def lift_deadline(self, task: asyncio.Task[Any]) -> None:
        """Remove the deadline of a call, which then can send its status."""
        self._deadlines[task] = math.inf

    def discard(self, task: asyncio.Task[Any]) -> None:
        """Remove a call that has ended."""
        self._deadlines.pop(task, None)
        self._late.discard(task)

    def accept_deadline(self, task: asyncio.Task[Any]) -> bool:
        """Undo the cancellation of a call at its deadline, so that it can send its status.

        Return False if the call was not cancelled there, or by something else as well.
        """
        return task in self._late and task.uncancel() == 0

    async def drain(self) -> None:
        """Wait until all calls have ended, including their clean-up."""
        while self._deadlines:
            await asyncio.wait(self._deadlines)

    def _start_timer(self) -> None:
        self._has_timer = True
        asyncio.get_running_loop().call_later(TICK_SECONDS, self._cancel_late_calls)

    def _cancel_late_calls(self) -> None:
        now = time.monotonic()
        for task, deadline in self._deadlines.items():
            # A call that is being cancelled already is left to clean up.
            if deadline <= now and not task.cancelling():
                self._late.add(task)
                task.cancel()
        self._has_timer = False
        if self._deadlines:
            self._start_timer()
