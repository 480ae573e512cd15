"""Requests to erase the personal data of a store's customers, and the transactions that erase it a batch at a time."""

import secrets
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any, Protocol

import structlog
from sqlalchemy import BigInteger, Text, and_, bindparam, case, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from pointbook_server.db.clock_skew import ServerClock
from pointbook_server.db.database import Connection, Database, RetryTransactionError, Row, Statement
from pointbook_server.db.tables import store_erasures, stores
from pointbook_server.errors import PointbookError, store_not_found
from pointbook_server.metrics import Metrics
from pointbook_server.programs.model import ErasureOutcome, ErasureProgress, StoreErasure, new_erasure

BATCH_BUYERS = 100
"""How many buyers a transaction erases: their customers are locked until it ends."""
BATCH_WEBHOOKS = 500
BATCHES_MAX = 10
CALL_SECONDS_MAX = 10.0
"""A call begins no further batch after this time, well before its deadline."""

ERASURE = store_erasures.c
IS_ERASURE = and_(ERASURE.event_id == bindparam("event"), ERASURE.merchant_id == bindparam("merchant"))
IS_OF_STORE = and_(ERASURE.store_id == bindparam("store"), ERASURE.merchant_id == bindparam("merchant"))
IS_OPEN = ERASURE.closed_at_ms.is_(None)
ORDER = (
    case((IS_OPEN, 0), else_=1),
    case((IS_OPEN, ERASURE.due_at_ms), else_=-ERASURE.closed_at_ms),
    ERASURE.event_id,
)
IS_BEHIND = tuple_(*ORDER) > tuple_(
    bindparam("after_rank", type_=BigInteger),
    bindparam("after_ms", type_=BigInteger),
    bindparam("after_event", type_=Text),
)
FIRST_PLACE = (-1, 0, "")

READ_STORE_OWNER = Statement(select(stores.c.merchant_id).where(stores.c.store_id == bindparam("store")))
# Waits for the store's customer webhooks, which share it, and not for new accounts, which only refer to it.
LOCK_STORE = Statement(
    select(stores.c.store_id).where(stores.c.store_id == bindparam("store")).with_for_update(key_share=True)
)
READ_ERASURES = Statement(select(store_erasures).where(IS_OF_STORE))
LOCK_OPEN = Statement(select(store_erasures).where(IS_OF_STORE, IS_OPEN).with_for_update())
INSERT_ERASURE = Statement(
    insert(store_erasures)
    .values({column.name: bindparam(column.name) for column in ERASURE})
    .on_conflict_do_nothing()
    .returning(ERASURE.event_id)
)
UPDATE_ERASURE = Statement(
    update(store_erasures)
    .where(IS_ERASURE)
    .values({name: bindparam(name) for name in ("begun_at_ms", "erased_to", "closed_at_ms", "reason")})
)
SUM_OPEN = Statement(
    select(
        func.count().label("open"),
        func.count().filter(ERASURE.due_at_ms <= bindparam("now", type_=BigInteger)).label("overdue"),
    ).where(IS_OPEN)
)
LIST_ERASURES = Statement(
    select(store_erasures)
    .where(ERASURE.merchant_id == bindparam("merchant"), IS_BEHIND)
    .order_by(*ORDER)
    .limit(bindparam("limit"))
)
LIST_ALL_ERASURES = Statement(
    select(store_erasures).where(ERASURE.merchant_id > "", IS_BEHIND).order_by(*ORDER).limit(bindparam("limit"))
)
NAMES = [field.name for field in fields(StoreErasure)]

log = structlog.get_logger()


class Customers(Protocol):
    """What knows the customers of a store."""

    def check_key(self) -> None:
        """Raise KEY_NOT_CONFIGURED where there is no key for tombstones."""

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
        heirs: set[str],
    ) -> list[str]:
        """Erase the personal data of a store's buyers behind one in their order, and return the ids of those.

        `heirs` collects what the transaction has to lock when it is run again.
        """

    async def count_store_buyers(self, connection: Connection, merchant_id: str, store_id: str, after: str) -> int:
        """Count a store's buyers with personal data behind one in their order."""

    async def audit_store(
        self, connection: Connection, merchant_id: str, store_id: str, reason: str, now_ms: int
    ) -> None:
        """Audit that a store was erased."""


class Quarantine(Protocol):
    """Where webhooks with the personal data of a store's customers may be."""

    async def erase_store(self, connection: Connection, merchant_id: str, store_id: str, limit: int) -> int:
        """Erase bodies of a store's customer webhooks, and return how many."""

    async def count_store(self, connection: Connection, merchant_id: str, store_id: str) -> int:
        """Count a store's customer webhooks that have a body."""


class StoreErasures:
    """Keeps requests, erases stores, and counts the open requests in the metrics."""

    def __init__(
        self, database: Database, customers: Customers, quarantine: Quarantine, clock: ServerClock, metrics: Metrics
    ) -> None:
        self._database = database
        self._customers = customers
        self._quarantine = quarantine
        self._clock = clock
        self._metrics = metrics

    async def request(self, request: StoreErasure) -> tuple[ErasureOutcome, StoreErasure]:
        """Keep a request, unless an erasure of the store covers it. Raises STORE_NOT_FOUND.

        An open erasure that began before the request starts from the beginning again.
        """
        merchant_id, store_id = request.merchant_id, request.store_id

        async def work(connection: Connection) -> tuple[ErasureOutcome, StoreErasure]:
            await _check_store(connection, merchant_id, store_id, is_update=True)
            known = [erasure for erasure in await _read(connection, merchant_id, store_id) if erasure.covers(request)]
            if not known:
                await _insert(connection, request)
                return ErasureOutcome.REQUESTED, request
            for erasure in known:
                if erasure.is_open:
                    if erasure.begun_before(request):
                        await _restart(connection, erasure)
                    return ErasureOutcome.ALREADY_REQUESTED, erasure
            return ErasureOutcome.ALREADY_ERASED, _newest(known)

        outcome, erasure = await self._database.transaction(work)
        if outcome is ErasureOutcome.REQUESTED:
            await self._refresh()
        return outcome, erasure

    async def erase(self, merchant_id: str, store_id: str, reason: str) -> ErasureProgress:
        """Erase a part of a store, and close its request when nothing remains.

        Raises STORE_NOT_FOUND, and KEY_NOT_CONFIGURED where there is no key for tombstones.
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
            await self._refresh()
            return ErasureProgress(erasure, erased, 0)
        remaining = await self._database.transaction(
            lambda connection: self._count(connection, merchant_id, store_id, erasure.erased_to)
        )
        return ErasureProgress(erasure, erased, max(remaining, 1))

    async def erasures(self, merchant_id: str, *, after: tuple[int, int, str], limit: int) -> list[StoreErasure]:
        """Read a page of requests behind a place: a merchant's, or all of them for no merchant."""
        place = dict(zip(("after_rank", "after_ms", "after_event"), after, strict=True))
        async with self._database.autocommit() as connection:
            if not merchant_id:
                rows = await connection.fetch(LIST_ALL_ERASURES, {**place, "limit": limit})
            else:
                rows = await connection.fetch(LIST_ERASURES, {**place, "merchant": merchant_id, "limit": limit})
        return [_to_erasure(row) for row in rows]

    async def report_open(self) -> None:
        """Show in the metrics how many requests are open and overdue, and log an error for the overdue ones."""
        now = {"now": await self._database_ms()}
        row = await self._database.transaction(lambda connection: connection.fetch_one(SUM_OPEN, now))
        open_count, overdue = (0, 0) if row is None else (row.open, row.overdue)
        self._metrics.store_erasures_open.set(open_count)
        self._metrics.store_erasures_overdue.set(overdue)
        if overdue:
            log.error("store erasures are overdue: see `pointbook store erasures`", count=overdue)

    async def _database_ms(self) -> int:
        """Return the time that all servers share: by when an erasure began, later requests are answered or not."""
        async with self._database.autocommit() as connection:
            return await self._clock.read_database(connection)

    async def _refresh(self) -> None:
        """Show a change in the metrics; where that fails, housekeeping does it later."""
        with suppress(PointbookError):
            await self.report_open()

    async def _erase_batch(self, merchant_id: str, store_id: str, reason: str, now_ms: int) -> tuple[StoreErasure, int]:
        """Erase one batch of a store, and return how far its erasure has come, and how many buyers were erased."""
        heirs: set[str] = set()

        async def work(connection: Connection) -> tuple[StoreErasure, int]:
            await _check_store(connection, merchant_id, store_id)
            await connection.fetch_one(LOCK_STORE, {"store": store_id})
            erasure = await self._open(connection, merchant_id, store_id, now_ms)
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
                heirs=heirs,
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

    async def _open(self, connection: Connection, merchant_id: str, store_id: str, now_ms: int) -> StoreErasure:
        """Lock a store's open request, or open one; the last closed one where nothing is left to erase."""
        row = await connection.fetch_one(LOCK_OPEN, {"merchant": merchant_id, "store": store_id})
        if row is not None:
            return _to_erasure(row)
        earlier = await _read(connection, merchant_id, store_id)
        if earlier and not await self._count(connection, merchant_id, store_id, ""):
            return _newest(earlier)
        erasure = new_erasure(f"erasure-{secrets.token_hex(12)}", merchant_id, store_id, now_ms)
        await _insert(connection, erasure)
        return erasure

    async def _count(self, connection: Connection, merchant_id: str, store_id: str, after: str) -> int:
        """Count what is left to erase of a store, behind a buyer in their order."""
        buyers = await self._customers.count_store_buyers(connection, merchant_id, store_id, after)
        return buyers + await self._quarantine.count_store(connection, merchant_id, store_id)


def place_of(erasure: StoreErasure) -> tuple[int, int, str]:
    """Return where a request stands in lists: the open ones by when they are due, then the latest closed ones."""
    if erasure.closed_at_ms is None:
        return 0, erasure.due_at_ms, erasure.event_id
    return 1, -erasure.closed_at_ms, erasure.event_id


async def _check_store(connection: Connection, merchant_id: str, store_id: str, *, is_update: bool = False) -> None:
    """Raise STORE_NOT_FOUND unless the store is the merchant's; for an update it says whether it is another's."""
    row = await connection.fetch_one(READ_STORE_OWNER, {"store": store_id})
    if row is None or row.merchant_id != merchant_id:
        raise store_not_found(store_id, registered_elsewhere=is_update and row is not None)


async def _read(connection: Connection, merchant_id: str, store_id: str) -> list[StoreErasure]:
    rows = await connection.fetch(READ_ERASURES, {"merchant": merchant_id, "store": store_id})
    return [_to_erasure(row) for row in rows]


async def _insert(connection: Connection, erasure: StoreErasure) -> None:
    """Insert a request; where another call has just opened one for the store, the transaction runs again."""
    if await connection.fetch_one(INSERT_ERASURE, asdict(erasure)) is None:
        raise RetryTransactionError


async def _restart(connection: Connection, erasure: StoreErasure) -> None:
    """Make an open erasure start again; where another call has just closed it, the transaction runs again."""
    row = await connection.fetch_one(LOCK_OPEN, {"merchant": erasure.merchant_id, "store": erasure.store_id})
    if row is None:
        raise RetryTransactionError
    await _update(connection, replace(_to_erasure(row), erased_to=""))


async def _update(connection: Connection, erasure: StoreErasure) -> None:
    """Write how far a locked erasure has come."""
    named = {"event": erasure.event_id, "merchant": erasure.merchant_id}
    await connection.execute(UPDATE_ERASURE, asdict(erasure) | named)


def _newest(erasures: list[StoreErasure]) -> StoreErasure:
    return max(erasures, key=lambda erasure: erasure.closed_at_ms or 0)


def _to_erasure(row: Row) -> StoreErasure:
    values: dict[str, Any] = {name: row[name] for name in NAMES}
    return StoreErasure(**values)
