"""The jobs that each server runs at intervals: releases, deletions and metrics.

Jobs that cannot be undone use the database's clock, read once per round, and run only while the server's clock agrees.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import structlog

from pointbook_server.db.clock_skew import ClockSkew, ClockSkewError
from pointbook_server.db.database import Database
from pointbook_server.errors import PointbookError

INTERVAL_SECONDS = 60.0
"""The average interval of a server's rounds."""

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
    """Deletes rows that are no longer needed."""

    async def clean_up(self, now_ms: int) -> int:
        """Delete old rows; return how many."""


class StoreErasures(Protocol):
    """Counts open store erasures."""

    async def report_open(self) -> None:
        """Set the metrics of open and overdue erasures."""


class Quarantine(Protocol):
    """Counts quarantined webhooks."""

    async def refresh_metrics(self) -> None:
        """Set the metrics of the quarantine."""


class Maintenance:
    """The maintenance jobs of one server."""

    def __init__(
        self,
        database: Database,
        skew: ClockSkew,
        *,
        tokens: Tokens | None,
        redemptions: Redemptions,
        codes: CleanUp,
        refusals: CleanUp,
        store_erasures: StoreErasures,
        quarantine: Quarantine,
    ) -> None:
        self._database = database
        self._skew = skew
        self._tokens = tokens
        self._redemptions = redemptions
        self._codes = codes
        self._refusals = refusals
        self._store_erasures = store_erasures
        self._quarantine = quarantine

    async def run_maintenance(self) -> None:
        """Count open store erasures, then run all jobs at random intervals, forever."""
        await _log_failure(self._store_erasures.report_open())
        while True:
            await asyncio.sleep(random.uniform(0, 2 * INTERVAL_SECONDS))  # noqa: S311 - spreads the rounds of several servers
            await self.run_jobs()

    async def run_jobs(self) -> None:
        """Run all jobs once. A job that fails is logged and does not stop the others."""
        await self.write_token_use()
        await _log_failure(self._run_timed_jobs())
        await _log_failure(self._store_erasures.report_open())
        await _log_failure(self._quarantine.refresh_metrics())

    async def write_token_use(self) -> None:
        """Write when tokens were last used; log a failure."""
        if self._tokens is not None:
            await _log_failure(self._tokens.write_last_used())

    async def _run_timed_jobs(self) -> None:
        """Release and delete by the database's time, unless the server's clock differs."""
        try:
            async with self._database.autocommit() as connection:
                now_ms = await self._skew.read_trusted(connection)
        except ClockSkewError:
            return
        await _log_failure(self._release_overdue(now_ms))
        await _log_failure(self._clean_up(now_ms))

    async def _release_overdue(self, now_ms: int) -> None:
        """Release the redemptions that SHOPLINE did not book in time.

        Their holds no longer count.
        """
        if released := await self._redemptions.release_overdue(now_ms):
            log.warning("redemptions not booked in time, released", count=released)

    async def _clean_up(self, now_ms: int) -> None:
        """Delete old rows of codes and old refusals."""
        if deleted := await self._codes.clean_up(now_ms):
            log.info("old codes deleted", count=deleted)
        await self._refusals.clean_up(now_ms)


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


async def _log_failure(work: Awaitable[None]) -> None:
    """Run a job, and log its failure."""
    try:
        await work
    except PointbookError as error:
        log.warning("maintenance job failed", reason=error.reason.value)
    except Exception:
        log.exception("maintenance job failed")
