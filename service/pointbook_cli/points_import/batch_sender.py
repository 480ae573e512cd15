"""Batches of lines: in which order they are sent, and the retries of each."""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_cli.points_import.line_counts import LineCounts
from pointbook_cli.points_import.sorted_lines import LineBatch, SortedLine
from pointbook_cli.progress import Meter
from pointbook_cli.server_channel import authorization

CALL_TIMEOUT_SECONDS = 30.0
RETRY_SECONDS_MAX = 120.0
"""The maximum time for retries of a batch before the import fails."""
PAUSE_SECONDS_MIN = 0.1
PAUSE_SECONDS_MAX = 4.0
"""The pause before a retry doubles from the minimum to the maximum."""
STOP_SECONDS = 5.0
"""The maximum time for calls to finish once the import is stopped."""
RETRIABLE_CODES = {
    code.value[0]: code.name
    for code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        # gRPC refuses calls with it while too many wait for the server.
        grpc.StatusCode.CANCELLED,
    )
}
"""The errors that a retry may resolve, by number."""


class BatchScheduler:
    """A scheduler that sends batches concurrently, but each account's events in order.

    A batch waits for earlier ones that share an account or an event_id with it.
    """

    def __init__(
        self, send: Callable[[LineBatch], Coroutine[Any, Any, None]], *, in_flight: int, stop: asyncio.Event
    ) -> None:
        self._send = send
        self._in_flight = in_flight
        self._stop = stop
        self._sending: dict[asyncio.Task[None], LineBatch] = {}

    async def run(self, read: Callable[[], LineBatch | None]) -> None:
        """Send all batches, or those before the stop event.

        Raises the first error of `send`.
        """
        stopped = asyncio.create_task(self._stop.wait())
        try:
            while (batch := await asyncio.to_thread(read)) is not None:
                while self._must_wait(batch) and not stopped.done():
                    await self._wait_for_any(stopped)
                if self._stop.is_set():
                    break
                self._sending[asyncio.create_task(self._send(batch))] = batch
            while self._sending and not stopped.done():
                await self._wait_for_any(stopped)
            if self._sending:
                await asyncio.wait(self._sending, timeout=STOP_SECONDS)
        finally:
            for task in (stopped, *self._sending):
                task.cancel()
            await asyncio.gather(stopped, *self._sending, return_exceptions=True)

    def _must_wait(self, batch: LineBatch) -> bool:
        others = self._sending.values()
        return len(others) >= self._in_flight or any(not batch.shared.isdisjoint(other.shared) for other in others)

    async def _wait_for_any(self, stopped: "asyncio.Task[Any]") -> None:
        """Wait until a batch is done, or until the import is stopped."""
        done, _ = await asyncio.wait({*self._sending, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopped}:
            del self._sending[task]
            task.result()


class BatchSender:
    """A sender of batches, with retries until each line has a result."""

    def __init__(self, channel: grpc.aio.Channel, token: str, counts: LineCounts, meter: Meter) -> None:
        self._points = points_pb2_grpc.PointsServiceStub(channel)
        self._metadata = authorization(token)
        self._counts = counts
        self._meter = meter
        self._is_retrying = False

    async def send(self, batch: LineBatch) -> None:
        """Send a batch until each line has a result.

        Raises OSError if the server refuses the call, or is unavailable for too long.
        """
        deadline = time.monotonic() + RETRY_SECONDS_MAX
        pause = PAUSE_SECONDS_MIN
        lines: Sequence[SortedLine] = batch.lines
        while lines:
            lines, cause = await self._send_once(lines)
            if not lines:
                break
            if time.monotonic() > deadline:
                raise OSError(f"the server has returned {cause} for {RETRY_SECONDS_MAX:.0f} seconds")
            if not self._is_retrying:
                self._is_retrying = True
                self._meter.print(f"{cause}: retrying for up to {RETRY_SECONDS_MAX:.0f} seconds")
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - only jitter
            pause = min(pause * 2, PAUSE_SECONDS_MAX)
        self._is_retrying = False
        self._meter.advance(len(batch.lines))

    async def _send_once(self, lines: Sequence[SortedLine]) -> tuple[Sequence[SortedLine], str]:
        """Send lines once; return those to send again, and the name of their error."""
        updates = [line.update for line in lines]
        request = points_pb2.BatchApplyPointsUpdatesRequest(updates=updates, outcomes_only=True)
        try:
            response = await self._points.BatchApplyPointsUpdates(
                request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            if error.code().value[0] not in RETRIABLE_CODES:
                raise OSError(f"the server refused the call: {error.code().name}: {error.details()}") from error
            return lines, error.code().name
        remaining, cause = [], ""
        for line, result in zip(lines, response.results, strict=True):
            if result.error.code in RETRIABLE_CODES:
                remaining.append(line)
                cause = RETRIABLE_CODES[result.error.code]
            else:
                self._counts.add_result(line, result)
        return remaining, cause
