"""The transactions of refused calls."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from pointbook_server.db.database import Database
from pointbook_server.redemption.refusal import Refusal
from pointbook_server.rpc.pagination import PageQuery
from pointbook_server.support import queries


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
