"""The capacity of all quarantines together.

The sum of their usage is read at most once a second, and only when new webhooks arrive: a shared row to count in would
make merchants wait for each other. One process never exceeds the capacity. Several processes may exceed it by what the
others store within a second.
"""

import asyncio
import time

from pointbook_server.db.database import Database
from pointbook_server.metrics import Metrics
from pointbook_server.settings import ServerSettings
from pointbook_server.webhooks import queries
from pointbook_server.webhooks.model import Capacity, QuarantineLimits

SUM_LIFETIME_SECONDS = 1.0


def limits_of(settings: ServerSettings) -> QuarantineLimits:
    """Return the limits of quarantines in the settings."""
    return QuarantineLimits(
        merchant=Capacity(settings.quarantine_webhooks_max, settings.quarantine_bytes_max),
        shared=Capacity(settings.quarantine_shared_webhooks_max, settings.quarantine_shared_bytes_max),
        total=Capacity(settings.quarantine_total_webhooks_max, settings.quarantine_total_bytes_max),
    )


class TotalQuota:
    """Reserves space for new webhooks in the capacity of all quarantines together."""

    def __init__(self, database: Database, capacity: Capacity, metrics: Metrics) -> None:
        self._database = database
        self._capacity = capacity
        self._metrics = metrics
        self._lock = asyncio.Lock()
        self._sum_expires_at = 0.0
        self._webhooks = self._bytes = 0
        self._reserved_webhooks = self._reserved_bytes = 0

    async def reserve(self, size: int) -> bool:
        """Reserve space for one webhook; return False if there is none.

        `settle` ends the reservation.
        """
        async with self._lock:
            if time.monotonic() >= self._sum_expires_at:
                await self._read_sum()
        if self._webhooks >= self._capacity.webhooks_max or self._bytes + size > self._capacity.bytes_max:
            return False
        self._webhooks += 1
        self._bytes += size
        self._reserved_webhooks += 1
        self._reserved_bytes += size
        return True

    def settle(self, size: int, *, may_be_stored: bool) -> None:
        """End a reservation.

        Its space is free at once if the webhook is certainly not stored.
        """
        self._reserved_webhooks -= 1
        self._reserved_bytes -= size
        if not may_be_stored:
            self._webhooks -= 1
            self._bytes -= size

    def expire(self) -> None:
        """Read the sum again before the next reservation, because space was freed."""
        self._sum_expires_at = 0.0

    async def refresh(self) -> tuple[int, int]:
        """Read the sum, for the next reservations and for the metrics.

        Return the webhooks and the bytes.
        """
        async with self._lock:
            await self._read_sum()
            return self._webhooks, self._bytes

    async def _read_sum(self) -> None:
        """Read the sum while holding the lock, so that nothing is reserved meanwhile.

        Earlier reservations are added, even if they are committed or cancelled during the read: for a second the sum
        may be too high, but never too low.
        """
        reserved_webhooks, reserved_bytes = self._reserved_webhooks, self._reserved_bytes
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(queries.SUM_USAGE, {})
        webhooks, size = (0, 0) if row is None else (row.webhooks, row.bytes)
        self._webhooks, self._bytes = webhooks + reserved_webhooks, size + reserved_bytes
        self._sum_expires_at = time.monotonic() + SUM_LIFETIME_SECONDS
        self._metrics.quarantine_webhooks.set(webhooks)
        self._metrics.quarantine_bytes.set(size)
