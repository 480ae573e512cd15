"""Transactions of stores and programs."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from pointbook_server.db.database import Connection, Database, Statement
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import PointbookError, next_revision, store_not_found
from pointbook_server.programs import queries
from pointbook_server.programs.model import Program, Store
from pointbook_server.reasons import Reason


class Quarantine(Protocol):
    """Quarantined webhooks of stores that no merchant has registered."""

    async def proves(self, connection: Connection, merchant_id: str, store_id: str) -> bool:
        """Return whether webhooks prove that a store is the merchant's.

        They do if at least one names both, and none names the store with another merchant.
        """


class ProgramTransactions:
    """Reads and writes stores and programs.

    Every change increments the revision, which is the etag.

    Without a quarantine, a merchant cannot prove that a store is theirs.
    """

    def __init__(self, database: Database, quarantine: Quarantine | None = None) -> None:
        self._database = database
        self._quarantine = quarantine

    async def put_store(self, store: Store, expected_revision: int | None, now_ms: int, *, may_register: bool) -> int:
        """Register or replace a store, and return its revision.

        Without `may_register`, registering a store requires a proof. Raises STORE_UNPROVEN, STORE_TAKEN if another
        merchant has the store, and STALE_ETAG.
        """

        async def work(connection: Connection) -> int:
            # Another merchant's row is not locked: waiting would reveal that it exists, and delay its owner.
            params = {"merchant": store.merchant_id, "store": store.store_id}
            row = await connection.fetch_one(queries.LOCK_STORE, params)
            if row is None:
                await self._check_registrable(connection, store, may_register=may_register)
            revision = next_revision(0 if row is None else row.revision, expected_revision)
            values = {**asdict(store), "revision": revision, "updated_at_ms": now_ms}
            if row is None:
                await _insert(connection, queries.INSERT_STORE, values)
            else:
                await connection.execute(queries.UPDATE_STORE, params | values)
            return revision

        return await self._database.transaction(work)

    async def _check_registrable(self, connection: Connection, store: Store, *, may_register: bool) -> None:
        """Raise STORE_TAKEN or STORE_UNPROVEN unless the caller may register it."""
        owner = await connection.fetch_one(queries.READ_STORE_OWNER, {"store": store.store_id})
        if may_register:
            if owner is not None and owner.merchant_id != store.merchant_id:
                raise PointbookError(
                    Reason.STORE_TAKEN,
                    "The store belongs to another merchant.",
                    metadata={"store_id": store.store_id},
                )
            return
        # Read even if the store has an owner, so that the response time does not reveal it.
        quarantine = self._quarantine
        is_proven = quarantine and await quarantine.proves(connection, store.merchant_id, store.store_id)
        if owner is not None or not is_proven:
            raise _store_unproven(store.store_id)

    async def release_store(self, merchant_id: str, store_id: str) -> None:
        """Release a store of a merchant.

        Raises STORE_NOT_FOUND, and STORE_IN_USE if the store has data.
        """
        params = {"merchant": merchant_id, "store": store_id}

        async def work(connection: Connection) -> None:
            if await connection.fetch_one(queries.LOCK_STORE, params) is None:
                raise store_not_found(store_id)
            if use := await connection.fetch_one(queries.READ_USES, params):
                raise PointbookError(
                    Reason.STORE_IN_USE,
                    "The store has data of its merchant, so it cannot be released.",
                    metadata={"store_id": store_id, "used_by": use.used_by},
                )
            await connection.execute(queries.DELETE_STORE, params)

        await self._database.transaction(work)

    async def read_store(self, merchant_id: str, store_id: str) -> tuple[Store, int]:
        """Return a store and its revision.

        Raises STORE_NOT_FOUND, also for another merchant's store.
        """
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(queries.READ_STORE, {"merchant": merchant_id, "store": store_id})
        if row is None:
            raise store_not_found(store_id)
        return queries.read_store(row), row.revision

    async def list_stores(self, merchant_id: str, *, after: str, limit: int) -> list[Store]:
        """Return a merchant's next stores after a store_id."""
        params = {"merchant": merchant_id, "after": after, "limit": limit}
        async with self._database.autocommit() as connection:
            return [queries.read_store(row) for row in await connection.fetch(queries.LIST_STORES, params)]

    async def put_program(self, program: Program, expected_revision: int | None, now_ms: int) -> int:
        """Create or replace a program, and return its revision.

        Raises STORE_NOT_FOUND for a store that the merchant does not have, and STALE_ETAG.
        """

        async def work(connection: Connection) -> int:
            await _check_stores(connection, program.merchant_id, program.store_ids)
            params = _program_params(program.merchant_id, program.program_id)
            row = await connection.fetch_one(queries.LOCK_PROGRAM, params)
            revision = next_revision(0 if row is None else row.revision, expected_revision)
            values = {**queries.program_columns(program), "revision": revision, "updated_at_ms": now_ms}
            if row is None:
                await _insert(connection, queries.INSERT_PROGRAM, values)
            else:
                await connection.execute(queries.UPDATE_PROGRAM, params | values)
            return revision

        return await self._database.transaction(work)

    async def read_program(self, merchant_id: str, program_id: int) -> tuple[Program, int] | None:
        """Return a program and its revision; None if the merchant has no such program."""
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(queries.READ_PROGRAM, _program_params(merchant_id, program_id))
        return None if row is None else (queries.read_program(row), row.revision)

    async def read(self, connection: Connection, merchant_id: str, program_ids: Collection[int]) -> dict[int, Program]:
        """Return those of some programs that the merchant has, by their ids.

        It runs inside the caller's transaction, as does `read_cross_program`.
        """
        params = {"merchant": merchant_id, "program_ids": sorted(program_ids)}
        rows = await connection.fetch(queries.READ_PROGRAMS, params)
        return {row.program_id: queries.read_program(row) for row in rows}

    async def read_cross_program(self, connection: Connection, merchant_id: str) -> list[Program]:
        """Return the merchant's programs that allow cross-program redemption."""
        rows = await connection.fetch(queries.READ_CROSS_PROGRAM, {"merchant": merchant_id})
        return [queries.read_program(row) for row in rows]

    async def own_stores(
        self, connection: Connection, merchant_id: str, store_ids: Collection[str], *, is_update: bool = False
    ) -> set[str]:
        """Return those of some stores that the merchant has.

        For an update, they cannot be released before the transaction commits.
        """
        statement = queries.SHARE_STORES if is_update else queries.READ_OWN_STORES
        rows = await connection.fetch(statement, {"merchant": merchant_id, "stores": sorted(store_ids)})
        return {row.store_id for row in rows}

    async def list_programs(self, merchant_id: str, *, after: int, limit: int) -> list[Program]:
        """Return a merchant's next programs after a program_id."""
        params = {"merchant": merchant_id, "after": after, "limit": limit}
        async with self._database.autocommit() as connection:
            return [queries.read_program(row) for row in await connection.fetch(queries.LIST_PROGRAMS, params)]


def _store_unproven(store_id: str) -> PointbookError:
    return PointbookError(
        Reason.STORE_UNPROVEN,
        "The merchant has not registered the store, and no webhook proves that the store is theirs; ask an operator "
        "to register it.",
        metadata={"store_id": store_id},
    )


async def _insert(connection: Connection, statement: Statement, values: dict[str, Any]) -> None:
    """Insert a row.

    If another call has just inserted it, the transaction runs again and replaces it.
    """
    if not await connection.count_written(statement, values):
        raise RetryTransactionError


async def _check_stores(connection: Connection, merchant_id: str, store_ids: Sequence[str]) -> None:
    """Raise STORE_NOT_FOUND for the first store that the merchant does not have.

    The merchant's stores cannot be released before the transaction commits.
    """
    params = {"merchant": merchant_id, "stores": list(store_ids)}
    own = {row.store_id for row in await connection.fetch(queries.SHARE_STORES, params)}
    for store_id in store_ids:
        if store_id not in own:
            raise store_not_found(store_id)


def _program_params(merchant_id: str, program_id: int) -> dict[str, object]:
    return {"merchant": merchant_id, "program": program_id}
