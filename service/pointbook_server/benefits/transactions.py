"""Transactions of benefits and custom privileges."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from pointbook_server.benefits import queries
from pointbook_server.benefits.model import (
    Benefit,
    BenefitFilter,
    CustomPrivilege,
    benefit_not_found,
    custom_privilege_not_found,
)
from pointbook_server.db.database import Connection, Database, Row, Statement
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import first_revision, next_revision, store_not_found
from pointbook_server.programs.model import Program, program_not_found


class Programs(Protocol):
    """Stores and programs."""

    async def own_stores(
        self, connection: Connection, merchant_id: str, store_ids: Collection[str], *, is_update: bool = False
    ) -> set[str]:
        """Return those of some stores that the merchant has.

        For an update, they cannot be released before the transaction commits.
        """

    async def read(self, connection: Connection, merchant_id: str, program_ids: Collection[int]) -> dict[int, Program]:
        """Return those of some programs that the merchant has, by their ids."""


class BenefitTransactions:
    """Reads and writes benefits and custom privileges.

    Every change increments the revision, which is the etag. The first revision is random, so that the etag of a deleted
    benefit does not match a new one with the same id.
    """

    def __init__(self, database: Database, programs: Programs) -> None:
        self._database = database
        self._programs = programs

    async def put(self, benefit: Benefit, expected_revision: int | None, now_ms: int) -> int:
        """Create or replace a benefit, and return its revision.

        Raises STORE_NOT_FOUND for a store that the merchant does not have, and STALE_ETAG.
        """
        params = _benefit_params(benefit.merchant_id, benefit.benefit_id)

        async def work(connection: Connection) -> int:
            await self._check_stores(connection, benefit.merchant_id, benefit.store_ids, is_update=True)
            row = await connection.fetch_one(queries.LOCK_BENEFIT, params)
            revision = _revision_after(row, expected_revision)
            values = {**queries.benefit_columns(benefit), "revision": revision, "updated_at_ms": now_ms}
            if row is None:
                await _insert(connection, queries.INSERT_BENEFIT, values)
            else:
                await connection.execute(queries.UPDATE_BENEFIT, params | values)
            return revision

        return await self._database.transaction(work)

    async def read_benefit(self, merchant_id: str, benefit_id: str) -> tuple[Benefit, int]:
        """Return a benefit and its revision. Raises BENEFIT_NOT_FOUND."""
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(queries.READ_BENEFIT, _benefit_params(merchant_id, benefit_id))
        if row is None:
            raise benefit_not_found(benefit_id)
        return queries.read_benefit(row), row.revision

    async def list_benefits(
        self, merchant_id: str, benefit_filter: BenefitFilter, *, after: str, limit: int
    ) -> list[Benefit]:
        """Return a merchant's next benefits after a benefit_id.

        Raises STORE_NOT_FOUND and PROGRAM_NOT_FOUND if the filter names one that the merchant does not have.
        """
        store_id = benefit_filter.store_id
        async with self._database.autocommit() as connection:
            await self._check_stores(connection, merchant_id, [store_id] if store_id else [])
            params = {
                **asdict(benefit_filter),
                "merchant": merchant_id,
                "store": store_id,
                "program_stores": await self._program_stores(connection, merchant_id, benefit_filter.program_id),
                "after": after,
                "limit": limit,
            }
            return [queries.read_benefit(row) for row in await connection.fetch(queries.LIST_BENEFITS, params)]

    async def delete(self, merchant_id: str, benefit_id: str, expected_revision: int | None) -> None:
        """Delete a benefit. Raises BENEFIT_NOT_FOUND and STALE_ETAG."""
        params = _benefit_params(merchant_id, benefit_id)

        async def work(connection: Connection) -> None:
            row = await connection.fetch_one(queries.LOCK_BENEFIT, params)
            if row is None:
                raise benefit_not_found(benefit_id)
            next_revision(row.revision, expected_revision)
            await connection.execute(queries.DELETE_BENEFIT, params)

        await self._database.transaction(work)

    async def put_privilege(self, privilege: CustomPrivilege, expected_revision: int | None, now_ms: int) -> int:
        """Create or replace a custom privilege, and return its revision.

        Raises STALE_ETAG.
        """
        params = _privilege_params(privilege.merchant_id, privilege.privilege_id)

        async def work(connection: Connection) -> int:
            row = await connection.fetch_one(queries.LOCK_PRIVILEGE, params)
            revision = _revision_after(row, expected_revision)
            values = {**asdict(privilege), "revision": revision, "updated_at_ms": now_ms}
            if row is None:
                await _insert(connection, queries.INSERT_PRIVILEGE, values)
            else:
                await connection.execute(queries.UPDATE_PRIVILEGE, params | values)
            return revision

        return await self._database.transaction(work)

    async def read_privilege(self, merchant_id: str, privilege_id: str) -> tuple[CustomPrivilege, int]:
        """Return a custom privilege and its revision. Raises CUSTOM_PRIVILEGE_NOT_FOUND."""
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(queries.READ_PRIVILEGE, _privilege_params(merchant_id, privilege_id))
        if row is None:
            raise custom_privilege_not_found(privilege_id)
        return queries.read_privilege(row), row.revision

    async def list_privileges(
        self, merchant_id: str, level_code: str, *, after: str, limit: int
    ) -> list[CustomPrivilege]:
        """Return the next custom privileges after a privilege_id.

        An empty level_code means all levels.
        """
        params = {"merchant": merchant_id, "level_code": level_code, "after": after, "limit": limit}
        async with self._database.autocommit() as connection:
            return [queries.read_privilege(row) for row in await connection.fetch(queries.LIST_PRIVILEGES, params)]

    async def delete_privilege(self, merchant_id: str, privilege_id: str, expected_revision: int | None) -> None:
        """Delete a custom privilege. Raises CUSTOM_PRIVILEGE_NOT_FOUND and STALE_ETAG."""
        params = _privilege_params(merchant_id, privilege_id)

        async def work(connection: Connection) -> None:
            row = await connection.fetch_one(queries.LOCK_PRIVILEGE, params)
            if row is None:
                raise custom_privilege_not_found(privilege_id)
            next_revision(row.revision, expected_revision)
            await connection.execute(queries.DELETE_PRIVILEGE, params)

        await self._database.transaction(work)

    async def _check_stores(
        self, connection: Connection, merchant_id: str, store_ids: Sequence[str], *, is_update: bool = False
    ) -> None:
        """Raise STORE_NOT_FOUND for the first store that the merchant does not have."""
        own: set[str] = set()
        if store_ids:
            own = await self._programs.own_stores(connection, merchant_id, store_ids, is_update=is_update)
        for store_id in store_ids:
            if store_id not in own:
                raise store_not_found(store_id)

    async def _program_stores(self, connection: Connection, merchant_id: str, program_id: int) -> list[str] | None:
        """Return the stores of a program; None if `program_id` is 0."""
        if not program_id:
            return None
        programs = await self._programs.read(connection, merchant_id, [program_id])
        if program_id not in programs:
            raise program_not_found(program_id)
        return list(programs[program_id].store_ids)


def _benefit_params(merchant_id: str, benefit_id: str) -> dict[str, str]:
    return {"benefit": benefit_id, "merchant": merchant_id}


def _privilege_params(merchant_id: str, privilege_id: str) -> dict[str, str]:
    return {"privilege": privilege_id, "merchant": merchant_id}


def _revision_after(row: Row | None, expected_revision: int | None) -> int:
    """Return the revision of a row that is about to be written. Raises STALE_ETAG."""
    revision = next_revision(0 if row is None else row.revision, expected_revision)
    return first_revision() if row is None else revision


async def _insert(connection: Connection, statement: Statement, values: dict[str, Any]) -> None:
    """Insert a row.

    If another call has just inserted it, the transaction runs again and replaces it.
    """
    if not await connection.count_written(statement, values):
        raise RetryTransactionError
