"""Transactions that record requests to erase stores, and carry them out."""

import secrets
import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Protocol

import structlog

from pointbook_server.db.clock_skew import ServerClock
from pointbook_server.db.database import Connection, Database
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import PointbookError, store_not_found
from pointbook_server.metrics import Metrics
from pointbook_server.programs.erasures import queries
from pointbook_server.programs.erasures.model import (
    ErasureOutcome,
    ErasurePosition,
    ErasureProgress,
    StoreErasure,
    new_erasure,
)

BATCH_BUYERS = 100
"""How many buyers a transaction erases; their customers are locked until it commits."""
BATCH_WEBHOOKS = 500
BATCHES_MAX = 10
CALL_SECONDS_MAX = 10.0
"""A call starts no further batch after this time, well before its deadline."""

log = structlog.get_logger()


class Customers(Protocol):
    """The customers of stores."""

    def check_key(self) -> None:
        """Raise KEY_NOT_CONFIGURED if this server has no key for tombstones."""

    async def erase_store_buyers(
        self,
        connection: Connection,
        merchant_id: str,
        store_id: str,
        *,
        after: str,
        limit: int,
        reason: str,
        now_ms: int,
        claimants: set[str],
    ) -> list[str]:
        """Erase the personal data of a store's next buyers, and return their ids.

        `claimants` collects the customers that the next attempt of the transaction must lock.
        """

    async def count_store_buyers(self, connection: Connection, merchant_id: str, store_id: str, after: str) -> int:
        """Return how many of a store's buyers after a buyer_id have personal data."""

    async def audit_store(
        self, connection: Connection, merchant_id: str, store_id: str, reason: str, now_ms: int
    ) -> None:
        """Write into the audit that a store was erased."""


class Quarantine(Protocol):
    """Quarantined webhooks, which may hold personal data of a store's customers."""

    async def erase_store(self, connection: Connection, merchant_id: str, store_id: str, limit: int) -> int:
        """Erase bodies of a store's customer webhooks, and return how many."""

    async def count_store(self, connection: Connection, merchant_id: str, store_id: str) -> int:
        """Return how many customer webhooks of a store have a body."""


class StoreErasureTransactions:
    """Records requests, erases stores, and updates the metrics of open requests."""

    def __init__(
        self, database: Database, customers: Customers, quarantine: Quarantine, clock: ServerClock, metrics: Metrics
    ) -> None:
        self._database = database
        self._customers = customers
        self._quarantine = quarantine
        self._clock = clock
        self._metrics = metrics

    async def request(self, request: StoreErasure) -> tuple[ErasureOutcome, StoreErasure]:
        """Record a request, unless another erasure of the store covers it.

        Raises STORE_NOT_FOUND.

        An open erasure that began before the request starts again from the first buyer.
        """
        merchant_id, store_id = request.merchant_id, request.store_id

        async def work(connection: Connection) -> tuple[ErasureOutcome, StoreErasure]:
            await _check_store(connection, merchant_id, store_id, is_update=True)
            covering = [
                erasure for erasure in await _read_all(connection, merchant_id, store_id) if erasure.covers(request)
            ]
            if not covering:
                await _insert(connection, request)
                return ErasureOutcome.REQUESTED, request
            for erasure in covering:
                if erasure.is_open:
                    if erasure.begun_before(request):
                        await _restart(connection, erasure)
                    return ErasureOutcome.ALREADY_REQUESTED, erasure
            return ErasureOutcome.ALREADY_ERASED, _latest(covering)

        outcome, erasure = await self._database.transaction(work)
        if outcome is ErasureOutcome.REQUESTED:
            await self._try_report_open()
        return outcome, erasure

    async def erase(self, merchant_id: str, store_id: str, reason: str) -> ErasureProgress:
        """Erase a part of a store, and close its request when nothing remains.

        Raises STORE_NOT_FOUND, and KEY_NOT_CONFIGURED if this server has no key for tombstones.
        """
        self._customers.check_key()
        now_ms, started = await self._database_ms(), time.monotonic()
        erased = 0
        for _ in range(BATCHES_MAX):
            erasure, count = await self._erase_batch(merchant_id, store_id, reason, now_ms)
            erased += count
            if not erasure.is_open or time.monotonic() - started > CALL_SECONDS_MAX:
                break
        if not erasure.is_open:
            await self._try_report_open()
            return ErasureProgress(erasure, erased, 0)
        remaining = await self._database.transaction(
            lambda connection: self._count(connection, merchant_id, store_id, erasure.erased_to)
        )
        return ErasureProgress(erasure, erased, max(remaining, 1))

    async def list_erasures(self, merchant_id: str, *, after: ErasurePosition, limit: int) -> list[StoreErasure]:
        """Return the next requests after a position.

        An empty merchant_id means those of all merchants.
        """
        params = {**queries.position_params(after), "limit": limit}
        async with self._database.autocommit() as connection:
            if not merchant_id:
                rows = await connection.fetch(queries.LIST_ALL_ERASURES, params)
            else:
                rows = await connection.fetch(queries.LIST_ERASURES, {**params, "merchant": merchant_id})
        return [queries.read_erasure(row) for row in rows]

    async def refresh_metrics(self, now_ms: int) -> None:
        """Update the metrics of open requests, and log an error if some are overdue."""
        open_count, overdue = await self._database.transaction(lambda connection: count_open(connection, now_ms))
        self._metrics.store_erasures_open.set(open_count)
        self._metrics.store_erasures_overdue.set(overdue)
        if overdue:
            log.error("store erasures are overdue: see `pointbook store erasures`", count=overdue)

    async def _database_ms(self) -> int:
        """Return the database's time, which decides what requests an erasure covers."""
        async with self._database.autocommit() as connection:
            return await self._clock.read_database(connection)

    async def _try_report_open(self) -> None:
        """Update the metrics; if that fails, the maintenance loop does it later."""
        with suppress(PointbookError):
            await self.refresh_metrics(await self._database_ms())

    async def _erase_batch(self, merchant_id: str, store_id: str, reason: str, now_ms: int) -> tuple[StoreErasure, int]:
        """Erase one batch, and return the erasure and the number of erased buyers."""
        claimants: set[str] = set()

        async def work(connection: Connection) -> tuple[StoreErasure, int]:
            await _check_store(connection, merchant_id, store_id)
            await connection.fetch_one(queries.LOCK_STORE, {"store": store_id})
            erasure = await self._lock_or_open(connection, merchant_id, store_id, now_ms)
            if not erasure.is_open:
                return erasure, 0
            buyer_ids = await self._customers.erase_store_buyers(
                connection,
                merchant_id,
                store_id,
                after=erasure.erased_to,
                limit=BATCH_BUYERS,
                reason=reason,
                now_ms=now_ms,
                claimants=claimants,
            )
            erasure = replace(
                erasure,
                begun_at_ms=erasure.begun_at_ms if erasure.erased_to else now_ms,
                erased_to=buyer_ids[-1] if buyer_ids else erasure.erased_to,
                reason=reason,
            )
            if len(buyer_ids) < BATCH_BUYERS:
                bodies = await self._quarantine.erase_store(connection, merchant_id, store_id, BATCH_WEBHOOKS)
                if bodies < BATCH_WEBHOOKS:
                    await self._customers.audit_store(connection, merchant_id, store_id, reason, now_ms)
                    erasure = replace(erasure, erased_to="", closed_at_ms=now_ms)
            await _update(connection, erasure)
            return erasure, len(buyer_ids)

        return await self._database.transaction(work)

    async def _lock_or_open(self, connection: Connection, merchant_id: str, store_id: str, now_ms: int) -> StoreErasure:
        """Lock and return a store's open request, or create one.

        If nothing is left to erase, return the latest closed one.
        """
        row = await connection.fetch_one(queries.LOCK_OPEN, {"merchant": merchant_id, "store": store_id})
        if row is not None:
            return queries.read_erasure(row)
        closed = await _read_all(connection, merchant_id, store_id)
        if closed and not await self._count(connection, merchant_id, store_id, ""):
            return _latest(closed)
        erasure = new_erasure(f"erasure-{secrets.token_hex(12)}", merchant_id, store_id, now_ms)
        await _insert(connection, erasure)
        return erasure

    async def _count(self, connection: Connection, merchant_id: str, store_id: str, after: str) -> int:
        """Return how many buyers after a buyer_id, and webhooks, remain to be erased."""
        buyers = await self._customers.count_store_buyers(connection, merchant_id, store_id, after)
        return buyers + await self._quarantine.count_store(connection, merchant_id, store_id)


async def count_open(connection: Connection, now_ms: int) -> tuple[int, int]:
    """Return how many requests of all merchants are open, and how many overdue."""
    (row,) = await connection.fetch(queries.COUNT_OPEN, {"now": now_ms})
    return row.open, row.overdue


async def _check_store(connection: Connection, merchant_id: str, store_id: str, *, is_update: bool = False) -> None:
    """Raise STORE_NOT_FOUND unless the merchant has the store.

    For an update, the error says whether another merchant has it.
    """
    row = await connection.fetch_one(queries.READ_STORE_OWNER, {"store": store_id})
    if row is None or row.merchant_id != merchant_id:
        raise store_not_found(store_id, registered_elsewhere=is_update and row is not None)


async def _read_all(connection: Connection, merchant_id: str, store_id: str) -> list[StoreErasure]:
    rows = await connection.fetch(queries.READ_ERASURES, {"merchant": merchant_id, "store": store_id})
    return [queries.read_erasure(row) for row in rows]


async def _insert(connection: Connection, erasure: StoreErasure) -> None:
    """Insert a request.

    If another call has just opened one for the store, the transaction runs again.
    """
    if await connection.fetch_one(queries.INSERT_ERASURE, asdict(erasure)) is None:
        raise RetryTransactionError


async def _restart(connection: Connection, erasure: StoreErasure) -> None:
    """Restart an open erasure.

    If another call has just closed it, the transaction runs again.
    """
    params = {"merchant": erasure.merchant_id, "store": erasure.store_id}
    row = await connection.fetch_one(queries.LOCK_OPEN, params)
    if row is None:
        raise RetryTransactionError
    await _update(connection, replace(queries.read_erasure(row), erased_to=""))


async def _update(connection: Connection, erasure: StoreErasure) -> None:
    """Write the progress of a locked erasure."""
    params = {"event": erasure.event_id, "merchant": erasure.merchant_id}
    await connection.execute(queries.UPDATE_ERASURE, asdict(erasure) | params)


def _latest(erasures: list[StoreErasure]) -> StoreErasure:
    return max(erasures, key=lambda erasure: erasure.closed_at_ms or 0)
