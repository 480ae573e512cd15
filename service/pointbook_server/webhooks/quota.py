"""How much all quarantines hold together, and the bound on it.

The sum is read at most once a second, and not at all while nothing new comes: no row is shared that would make
merchants wait for each other. One process never exceeds the bound. Several may together exceed it by what the others
keep within a second.
"""

import asyncio
import time

from sqlalchemy import BigInteger, cast, func, select

from pointbook_server.db.database import Database, Statement
from pointbook_server.db.tables import quarantine_usage
from pointbook_server.metrics import Metrics
from pointbook_server.webhooks.model import Bounds

FRESH_SECONDS = 1.0

SUM_USAGE = Statement(
    select(
        cast(func.coalesce(func.sum(quarantine_usage.c.webhooks), 0), BigInteger).label("webhooks"),
        cast(func.coalesce(func.sum(quarantine_usage.c.bytes), 0), BigInteger).label("bytes"),
    )
)


class Quota:
    """Reserves space for new webhooks in the bound on all quarantines together."""

    def __init__(self, database: Database, bounds: Bounds, metrics: Metrics) -> None:
        self._database = database
        self._bounds = bounds
        self._metrics = metrics
        self._lock = asyncio.Lock()
        self._fresh_until = 0.0
        self._webhooks = self._bytes = 0
        self._reserved_webhooks = self._reserved_bytes = 0

    async def reserve(self, size: int) -> bool:
        """Reserve space for one webhook; False where the bound is reached. `settle` ends the reservation."""
        async with self._lock:
            if time.monotonic() >= self._fresh_until:
                await self._refresh()
        if self._webhooks >= self._bounds.webhooks_max or self._bytes + size > self._bounds.bytes_max:
            return False
        self._webhooks += 1
        self._bytes += size
        self._reserved_webhooks += 1
        self._reserved_bytes += size
        return True

    def settle(self, size: int, *, may_be_kept: bool) -> None:
        """End a reservation; the space is free again at once where the webhook is certainly not kept."""
        self._reserved_webhooks -= 1
        self._reserved_bytes -= size
        if not may_be_kept:
            self._webhooks -= 1
            self._bytes -= size

    def expire(self) -> None:
        """Read the sum again before the next reservation: space was freed."""
        self._fresh_until = 0.0

    async def refresh(self) -> None:
        """Read what is kept, for the next reservations and for the metrics."""
        async with self._lock:
            await self._refresh()

    async def _refresh(self) -> None:
        """Read what is kept, under the lock, so that nothing is reserved meanwhile.

        What was reserved before counts on top of it, also where it is committed or given up meanwhile: for a second the
        sum may be too high, never too low.
        """
        reserved_webhooks, reserved_bytes = self._reserved_webhooks, self._reserved_bytes
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(SUM_USAGE, {})
        webhooks, size = (0, 0) if row is None else (row.webhooks, row.bytes)
        self._webhooks, self._bytes = webhooks + reserved_webhooks, size + reserved_bytes
        self._fresh_until = time.monotonic() + FRESH_SECONDS
        self._metrics.quarantine_webhooks.set(webhooks)
        self._metrics.quarantine_bytes.set(size)
