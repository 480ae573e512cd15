"""The transactions of refused calls."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from pointbook_server.db.database import Connection, Database
from pointbook_server.redemption.refusal import Refusal
from pointbook_server.rpc.pagination import PageQuery
from pointbook_server.support import queries

CLEAN_UP_COUNT = 1_000
"""The most rows that one transaction deletes."""


class RefusalTransactions:
    """The transactions that read, write and delete refusals."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, merchant_id: str, refusals: Sequence[Refusal]) -> None:
        """Insert refusals of one merchant, except those already stored."""
        params = {"merchant_id": merchant_id, **queries.to_columns(refusals)}
        async with self._database.autocommit() as connection:
            await connection.execute(queries.INSERT, params)

    async def list_by_customers(
        self, merchant_id: str, customers: Iterable[str], reference: str, query: PageQuery
    ) -> list[Refusal]:
        """Return a page of the refusals of some customer names, the newest first.

        An empty reference matches any.
        """
        params = {"merchant_id": merchant_id, "customers": sorted(customers), "reference": reference, **asdict(query)}
        async with self._database.autocommit() as connection:
            return list(map(queries.read_refusal, await connection.fetch(queries.LIST_BY_CUSTOMERS, params)))

    async def list_by_reference(self, merchant_id: str, reference: str, query: PageQuery) -> list[Refusal]:
        """Return a page of the refusals of a reference, the newest first."""
        params = {"merchant_id": merchant_id, "reference": reference, **asdict(query)}
        async with self._database.autocommit() as connection:
            return list(map(queries.read_refusal, await connection.fetch(queries.LIST_BY_REFERENCE, params)))

    async def old_merchants(self, before_ms: int) -> list[str]:
        """Return merchants that have refusals older than a time, without locks."""
        params = {"before_ms": before_ms, "limit": CLEAN_UP_COUNT}
        async with self._database.autocommit() as connection:
            return [row.merchant_id for row in await connection.fetch(queries.LIST_OLD_MERCHANTS, params)]

    async def delete_old(self, merchant_id: str, before_ms: int) -> int:
        """Delete some unlocked refusals older than a time; return how many."""
        params = {"merchant_id": merchant_id, "before_ms": before_ms, "limit": CLEAN_UP_COUNT}

        async def work(connection: Connection) -> int:
            return await connection.count_written(queries.DELETE_OLD_REFUSALS, params)

        return await self._database.transaction(work)
