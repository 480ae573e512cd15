"""Batches of lines: in which order they are sent, and their results."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pointbook_cli.points_import.line_counts import LineCounts
from pointbook_cli.points_import.sorted_lines import LineBatch
from pointbook_cli.progress import Meter
from pointbook_cli.server_access import describe_error
from pointbook_client import PointbookClient, PointbookError
from pointbook_client.retrying import RETRY_SECONDS, may_succeed_later

STOP_SECONDS = 5.0
"""The maximum time for calls to finish once the import is stopped."""


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
    """A sender of batches, which counts each line by its result."""

    def __init__(self, client: PointbookClient, counts: LineCounts, meter: Meter) -> None:
        self._client = client
        self._counts = counts
        self._meter = meter
        self._is_retrying = False

    async def send(self, batch: LineBatch) -> None:
        """Send a batch until each line has a result.

        Raises OSError if the server refuses the call, or is unavailable for too long.
        """
        updates = [line.update for line in batch.lines]
        try:
            results = await self._client.apply_updates(
                updates, retry_seconds=RETRY_SECONDS, on_retry=self._print_first_retry
            )
        except PointbookError as error:
            text = describe_error(error)
            if may_succeed_later(error):
                raise OSError(f"the server has returned errors for {RETRY_SECONDS:.0f} seconds: {text}") from error
            raise OSError(f"the server refused the call: {text}") from error
        for line, result in zip(batch.lines, results, strict=True):
            self._counts.add_result(line, result)
        self._is_retrying = False
        self._meter.advance(len(batch.lines))

    def _print_first_retry(self, error: PointbookError) -> None:
        """Print the first of several retries."""
        if not self._is_retrying:
            self._is_retrying = True
            self._meter.print(f"{error.grpc_code.name}: retrying for up to {RETRY_SECONDS:.0f} seconds")
