"""The jobs that each server runs at intervals: releases, deletions and metrics.

Jobs that cannot be undone use the database's clock, read once per round, and run only while the server's clock agrees.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol

import structlog

from pointbook_server.db.clock_skew import ClockSkew, ClockSkewError, ServerClock
from pointbook_server.db.database import Database
from pointbook_server.errors import PointbookError
from pointbook_server.metrics import Metrics, Timer

INTERVAL_SECONDS = 60.0
"""The average interval of a server's rounds."""

WRITE_TOKEN_USE, READ_CLOCK, RELEASE_OVERDUE, REFRESH_METRICS = TASKS = (
    "write_token_use",
    "read_clock",
    "release_overdue",
    "refresh_metrics",
)
"""The names of tasks that every server has."""

log = structlog.get_logger()


class Tokens(Protocol):
    """Writes when tokens were last used."""

    async def write_last_used(self) -> None:
        """Write when tokens were last used."""


class Redemptions(Protocol):
    """Releases the holds of overdue redemptions."""

    async def release_overdue(self, now_ms: int) -> int:
        """Release the redemptions that SHOPLINE did not book in time; return how many."""


class CleanUp(Protocol):
    """Deletes the rows of one table that are past their retention."""

    @property
    def name(self) -> str:
        """The name of the table."""

    async def clean_up(self, now_ms: int) -> int:
        """Delete a bounded number of old rows; return how many."""

    async def backlog(self, now_ms: int) -> int:
        """Return how many old rows are left, up to a bound."""


class MetricsSource(Protocol):
    """Reads the state of the database into metrics."""

    async def refresh_metrics(self, now_ms: int) -> None:
        """Set metrics as of a time of the database's clock."""


class Maintenance:
    """The maintenance jobs of one server."""

    def __init__(
        self,
        database: Database,
        clock: ServerClock,
        skew: ClockSkew,
        metrics: Metrics,
        *,
        tokens: Tokens | None,
        redemptions: Redemptions,
        clean_ups: Sequence[CleanUp],
        sources: Mapping[str, MetricsSource],
    ) -> None:
        self._database = database
        self._clock = clock
        self._skew = skew
        self._metrics = metrics
        self._tokens = tokens
        self._redemptions = redemptions
        self._clean_ups = clean_ups
        self._sources = sources
        for task in (*TASKS, *(f"delete_{each.name}" for each in clean_ups), *(f"refresh_{name}" for name in sources)):
            # From 0 on: Prometheus does not see the increase to a first value.
            metrics.task_failures.labels(task)

    async def run_maintenance(self) -> None:
        """Refresh the metrics, then run all jobs at random intervals, forever."""
        await self.refresh_metrics()
        while True:
            await asyncio.sleep(random.uniform(0, 2 * INTERVAL_SECONDS))  # noqa: S311 - spreads the rounds of several servers
            await self.run_jobs()

    async def run_jobs(self) -> None:
        """Run all jobs once. A job that fails is logged and does not stop the others."""
        await self.write_token_use()
        await self._run(READ_CLOCK, self._run_timed_jobs())
        await self.refresh_metrics()

    async def write_token_use(self) -> None:
        """Write when tokens were last used; log a failure."""
        if self._tokens is not None:
            await self._run(WRITE_TOKEN_USE, self._tokens.write_last_used())

    async def refresh_metrics(self) -> None:
        """Read the state of the database into the metrics; log failures."""
        await self._run(REFRESH_METRICS, self._refresh_sources())

    async def _refresh_sources(self) -> None:
        async with self._database.autocommit() as connection:
            now_ms = await self._clock.read_database(connection)
        for name, source in self._sources.items():
            await self._run(f"refresh_{name}", source.refresh_metrics(now_ms))

    async def _run_timed_jobs(self) -> None:
        """Release and delete by the database's time, unless the server's clock differs."""
        try:
            async with self._database.autocommit() as connection:
                now_ms = await self._skew.read_trusted(connection)
        except ClockSkewError:
            return
        await self._run(RELEASE_OVERDUE, self._release_overdue(now_ms))
        for clean_up in self._clean_ups:
            task = f"delete_{clean_up.name}"
            await self._run(task, self._clean_up(task, clean_up, now_ms))

    async def _release_overdue(self, now_ms: int) -> None:
        """Release the redemptions that SHOPLINE did not book in time.

        Their holds no longer count.
        """
        if released := await self._redemptions.release_overdue(now_ms):
            log.warning("redemptions not booked in time, released", count=released)

    async def _clean_up(self, task: str, table: CleanUp, now_ms: int) -> None:
        """Delete a table's old rows, and report how many are left."""
        deleted = await table.clean_up(now_ms)
        backlog = await table.backlog(now_ms)
        self._metrics.rows_deleted.labels(task).inc(deleted)
        self._metrics.rows_overdue.labels(task).set(backlog)
        if deleted or backlog:
            log.info("old rows deleted", table=table.name, count=deleted, backlog=backlog)

    async def _run(self, task: str, work: Awaitable[None]) -> None:
        """Run and measure a task, and log its failure."""
        try:
            with Timer(self._metrics.task_seconds.labels(task)):
                await work
        except PointbookError as error:
            self._metrics.task_failures.labels(task).inc()
            log.warning("maintenance failed", task=task, reason=error.reason.value)
        except Exception:
            self._metrics.task_failures.labels(task).inc()
            log.exception("maintenance failed", task=task)


async def merchant_by_merchant(
    find: Callable[[], Awaitable[Iterable[str]]], work: Callable[[str], Awaitable[int]]
) -> int:
    """Run `work` for the merchants that `find` returns, until nothing is left.

    Returns the sum of its results. `find` returns some merchants without locking anything. `work` processes a bounded
    number of one merchant's rows, skips rows that other servers have locked, and returns how many it processed.
    """
    count, previous = 0, -1
    while count > previous:
        previous = count
        for merchant_id in await find():
            while done := await work(merchant_id):
                count += done
    return count
