"""The calls that have not ended, which a stopping server waits for."""

import asyncio
from typing import Any


def current_task() -> asyncio.Task[Any]:
    """Return the task of the current call."""
    task = asyncio.current_task()
    assert task is not None, "gRPC runs each call in a task of its own"  # noqa: S101 - narrows the type
    return task


class RunningCalls:
    """The tasks of running calls.

    `grpc.aio.Server.stop` returns before handlers have cleaned up after themselves.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def add_current(self) -> asyncio.Task[Any]:
        """Add the current call, and return its task."""
        task = current_task()
        self._tasks.add(task)
        return task

    def discard(self, task: asyncio.Task[Any]) -> None:
        """Remove a call that has ended."""
        self._tasks.discard(task)

    async def drain(self) -> None:
        """Wait until all calls have ended, including their clean-up."""
        while self._tasks:
            await asyncio.wait(self._tasks)
