"""Reading the request of a unary call that is served as a stream."""

import asyncio
import time
from typing import Any

import grpc

from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason

TICKS = 10
"""How often late requests are looked for within the time that a request may take."""


class RequestReader:
    """Reads the request of each call within a time limit.

    For a unary method, gRPC itself waits for the request before it calls a handler, and without a limit. One timer
    serves all calls: a timer for each call would cost more than reading its request.
    """

    def __init__(self, seconds_max: float) -> None:
        self._seconds_max = seconds_max
        self._started_at: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._has_timer = False

    async def read(self, context: Any, task: asyncio.Task[Any]) -> bytes:
        """Return the request of the current call, whose task is given.

        Raises DEADLINE_EXCEEDED and INVALID_FIELDS.
        """
        self._started_at[task] = time.monotonic()
        if not self._has_timer:
            self._start_timer()
        try:
            request = await context.read()
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            self._late.remove(task)
            task.uncancel()
            raise PointbookError(
                Reason.DEADLINE_EXCEEDED, f"The request did not arrive within {self._seconds_max:g} s."
            ) from None
        finally:
            del self._started_at[task]
        if request is grpc.aio.EOF:
            raise PointbookError(Reason.INVALID_FIELDS, "The call has no request.")
        received: bytes = request
        return received

    def _start_timer(self) -> None:
        self._has_timer = True
        asyncio.get_running_loop().call_later(self._seconds_max / TICKS, self._cancel_late_reads)

    def _cancel_late_reads(self) -> None:
        started_before = time.monotonic() - self._seconds_max
        for task, started_at in self._started_at.items():
            if started_at > started_before:
                break  # the dict is in the order of the starts
            if task not in self._late:
                self._late.add(task)
                task.cancel()
        self._has_timer = False
        if self._started_at:
            self._start_timer()
