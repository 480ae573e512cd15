"""The SQL of stores and programs."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from sqlalchemy import (
    BigInteger,
    Table,
    Text,
    and_,
    any_,
    bindparam,
    delete,
    exists,
    literal,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from pointbook_server.db.database import Connection, Database, RetryTransactionError, Row, Statement
from pointbook_server.db.tables import benefits, customer_buyers, points_accounts, programs, store_erasures, stores
from pointbook_server.errors import PointbookError, Reason, next_revision, store_not_found
from pointbook_server.programs.model import Channel, Criteria, PhoneNumberType, Program, Store, Validation

IS_STORE = and_(stores.c.store_id == bindparam("store"), stores.c.merchant_id == bindparam("merchant"))
IS_PROGRAM = and_(programs.c.merchant_id == bindparam("merchant"), programs.c.program_id == bindparam("program"))
LOCK_STORE = Statement(select(stores).where(IS_STORE).with_for_update())
READ_STORE = Statement(select(stores).where(IS_STORE))
READ_OWNER = Statement(select(stores.c.merchant_id).where(stores.c.store_id == bindparam("store")))
LIST_STORES = Statement(
    select(stores)
    .where(stores.c.merchant_id == bindparam("merchant"), stores.c.store_id > bindparam("after"))
    .order_by(stores.c.store_id)
    .limit(bindparam("limit"))
)
KNOWN = select(stores.c.store_id).where(
    stores.c.merchant_id == bindparam("merchant"),
    stores.c.store_id == any_(bindparam("stores", type_=ARRAY(Text))),
)
KNOWN_STORES = Statement(KNOWN)
# Until it is committed, so that no store is released that it names.
SHARE_STORES = Statement(KNOWN.with_for_update(read=True, key_share=True))
# Accounts are found by their buyers only: where there is no other use, this reads them all.
READ_USES = Statement(
    union_all(
        *(
            select(literal(table.name).label("used_by")).where(
                exists().where(is_used, table.c.merchant_id == bindparam("merchant"))
            )
            for table, is_used in (
                (store_erasures, store_erasures.c.store_id == bindparam("store")),
                (customer_buyers, customer_buyers.c.store_id == bindparam("store")),
                (programs, bindparam("store") == any_(programs.c.store_ids)),
                (benefits, bindparam("store") == any_(benefits.c.store_ids)),
                (points_accounts, points_accounts.c.store_id == bindparam("store")),
            )
        )
    ).limit(1)
)
DELETE_STORE = Statement(delete(stores).where(IS_STORE))
READ_PROGRAM = Statement(select(programs).where(IS_PROGRAM))
READ_PROGRAMS = Statement(
    select(programs).where(
        programs.c.program_id == any_(bindparam("program_ids", type_=ARRAY(BigInteger))),
        programs.c.merchant_id == bindparam("merchant"),
    )
)
READ_ALLOWING = Statement(
    select(programs)
    .where(programs.c.merchant_id == bindparam("merchant"), programs.c.allow_cross_program_redemption)
    .order_by(programs.c.program_id)
)
LOCK_PROGRAM = Statement(select(programs).where(IS_PROGRAM).with_for_update())
LIST_PROGRAMS = Statement(
    select(programs)
    .where(programs.c.merchant_id == bindparam("merchant"), programs.c.program_id > bindparam("after"))
    .order_by(programs.c.program_id)
    .limit(bindparam("limit"))
)


class Quarantine(Protocol):
    """Where webhooks of stores wait that no merchant has."""

    async def proves(self, connection: Connection, merchant_id: str, store_id: str) -> bool:
        """Return whether a webhook that waits names a store and a merchant, and none names the store with another."""


class ProgramTransactions:
    """Reads and writes stores and programs. A revision counts up with every change, and is their etag.

    Without a quarantine, nothing proves whose a store is.
    """

    def __init__(self, database: Database, quarantine: Quarantine | None = None) -> None:
        self._database = database
        self._quarantine = quarantine

    async def put_store(self, store: Store, expected_revision: int | None, now_ms: int, *, may_register: bool) -> int:
        """Register or replace a store, and return its revision.

        Without `may_register`, a store that the merchant does not have takes a proof. Raises STORE_UNPROVEN,
        STORE_TAKEN for another merchant's store, and STALE_ETAG where another revision was expected.
        """

        async def work(connection: Connection) -> int:
            # Another merchant's row is not locked: waiting for it would tell that it is there, and make its owner wait.
            row = await connection.fetch_one(LOCK_STORE, {"merchant": store.merchant_id, "store": store.store_id})
            if row is None:
                await self._check_free(connection, store, may_register=may_register)
            revision = next_revision(0 if row is None else row.revision, expected_revision)
            values = {**asdict(store), "revision": revision, "updated_at_ms": now_ms}
            if row is None:
                await _insert(connection, stores, values)
            else:
                is_store = stores.c.store_id == store.store_id
                await connection.execute(Statement(update(stores).where(is_store).values(values)))
            return revision

        return await self._database.transaction(work)

    async def _check_free(self, connection: Connection, store: Store, *, may_register: bool) -> None:
        """Raise STORE_TAKEN or STORE_UNPROVEN unless the caller may register a store that the merchant lacks."""
        owner = await connection.fetch_one(READ_OWNER, {"store": store.store_id})
        if may_register:
            if owner is not None and owner.merchant_id != store.merchant_id:
                raise PointbookError(
                    Reason.STORE_TAKEN,
                    "The store belongs to another merchant.",
                    metadata={"store_id": store.store_id},
                )
            return
        # Read also where the store has an owner, so that not even the time tells.
        quarantine = self._quarantine
        is_proven = quarantine and await quarantine.proves(connection, store.merchant_id, store.store_id)
        if owner is not None or not is_proven:
            raise _store_unproven(store.store_id)

    async def release_store(self, merchant_id: str, store_id: str) -> None:
        """Release a store of a merchant. Raises STORE_NOT_FOUND, and STORE_IN_USE where it has data."""
        named = {"merchant": merchant_id, "store": store_id}

        async def work(connection: Connection) -> None:
            if await connection.fetch_one(LOCK_STORE, named) is None:
                raise store_not_found(store_id)
            if use := await connection.fetch_one(READ_USES, named):
                raise PointbookError(
                    Reason.STORE_IN_USE,
                    "The store has data of its merchant, and stays with it.",
                    metadata={"store_id": store_id, "used_by": use.used_by},
                )
            await connection.execute(DELETE_STORE, named)

        await self._database.transaction(work)

    async def store(self, merchant_id: str, store_id: str) -> tuple[Store, int]:
        """Read one store and its revision. Raises STORE_NOT_FOUND, also for another merchant's."""
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(READ_STORE, {"merchant": merchant_id, "store": store_id})
        if row is None:
            raise store_not_found(store_id)
        return _to_store(row), row.revision

    async def stores(self, merchant_id: str, *, after: str, limit: int) -> list[Store]:
        """Read a page of a merchant's stores, behind a store_id."""
        place = {"merchant": merchant_id, "after": after, "limit": limit}
        async with self._database.autocommit() as connection:
            return [_to_store(row) for row in await connection.fetch(LIST_STORES, place)]

    async def put_program(self, program: Program, expected_revision: int | None, now_ms: int) -> int:
        """Create or replace a program, and return its revision.

        Raises STORE_NOT_FOUND for a store that is not the merchant's, and STALE_ETAG where another revision was
        expected.
        """

        async def work(connection: Connection) -> int:
            await _check_stores(connection, program.merchant_id, program.store_ids)
            named = _named(program.merchant_id, program.program_id)
            row = await connection.fetch_one(LOCK_PROGRAM, named)
            revision = next_revision(0 if row is None else row.revision, expected_revision)
            values = {**_to_row(program), "revision": revision, "updated_at_ms": now_ms}
            if row is None:
                await _insert(connection, programs, values)
            else:
                await connection.execute(Statement(update(programs).where(IS_PROGRAM).values(values)), named)
            return revision

        return await self._database.transaction(work)

    async def program(self, merchant_id: str, program_id: int) -> tuple[Program, int] | None:
        """Read one program and its revision; None where the merchant has no such program."""
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(READ_PROGRAM, _named(merchant_id, program_id))
        return None if row is None else (_to_program(row), row.revision)

    async def read(self, connection: Connection, merchant_id: str, program_ids: Collection[int]) -> dict[int, Program]:
        """Read programs inside somebody's transaction, as far as the merchant has them."""
        rows = await connection.fetch(READ_PROGRAMS, {"merchant": merchant_id, "program_ids": sorted(program_ids)})
        return {row.program_id: _to_program(row) for row in rows}

    async def allowing(self, connection: Connection, merchant_id: str) -> list[Program]:
        """Read the merchant's programs that let their points be redeemed in others, inside somebody's transaction."""
        return [_to_program(row) for row in await connection.fetch(READ_ALLOWING, {"merchant": merchant_id})]

    async def own_stores(
        self, connection: Connection, merchant_id: str, store_ids: Collection[str], *, is_update: bool = False
    ) -> set[str]:
        """Return which stores are the merchant's; for an update they stay so until its transaction ends."""
        statement = SHARE_STORES if is_update else KNOWN_STORES
        rows = await connection.fetch(statement, {"merchant": merchant_id, "stores": sorted(store_ids)})
        return {row.store_id for row in rows}

    async def programs(self, merchant_id: str, *, after: int, limit: int) -> list[Program]:
        """Read a page of a merchant's programs, behind a program_id."""
        place = {"merchant": merchant_id, "after": after, "limit": limit}
        async with self._database.autocommit() as connection:
            return [_to_program(row) for row in await connection.fetch(LIST_PROGRAMS, place)]


def _store_unproven(store_id: str) -> PointbookError:
    return PointbookError(
        Reason.STORE_UNPROVEN,
        "The merchant does not have the store, and nothing proves whose it is; ask an operator to register it.",
        metadata={"store_id": store_id},
    )


async def _insert(connection: Connection, table: Table, values: dict[str, Any]) -> None:
    """Insert a row; where another call has just done so, run the transaction again and replace it."""
    if not await connection.execute(Statement(insert(table).values(values).on_conflict_do_nothing())):
        raise RetryTransactionError


async def _check_stores(connection: Connection, merchant_id: str, store_ids: Sequence[str]) -> None:
    """Raise STORE_NOT_FOUND for the first store that is not the merchant's; the others stay so until the end."""
    named = {"merchant": merchant_id, "stores": list(store_ids)}
    known = {row.store_id for row in await connection.fetch(SHARE_STORES, named)}
    for store_id in store_ids:
        if store_id not in known:
            raise store_not_found(store_id)


def _named(merchant_id: str, program_id: int) -> dict[str, object]:
    return {"merchant": merchant_id, "program": program_id}


def _to_store(row: Row) -> Store:
    return Store(row.merchant_id, row.store_id, row.shop_domain, row.display_name)


def _to_row(program: Program) -> dict[str, Any]:
    criteria = {name: points for name, points in asdict(program.criteria).items() if points is not None}
    validation = json.dumps(asdict(program.validation))
    return {**asdict(program), "criteria": json.dumps(criteria), "validation": validation}


def _to_program(row: Row) -> Program:
    return Program(
        merchant_id=row.merchant_id,
        program_id=row.program_id,
        store_ids=tuple(row.store_ids),
        display_name=row.display_name,
        redemption_enabled=row.redemption_enabled,
        time_zone=row.time_zone,
        default_region=row.default_region,
        allowed_regions=tuple(row.allowed_regions),
        criteria=Criteria(**json.loads(row.criteria)),
        point_value=row.point_value,
        currency_code=row.currency_code,
        local_currency_code=row.local_currency_code,
        local_currency_rate=row.local_currency_rate,
        local_currency_decimals=row.local_currency_decimals,
        allow_group_redemption=row.allow_group_redemption,
        allow_cross_program_redemption=row.allow_cross_program_redemption,
        settlement_window_ms=row.settlement_window_ms,
        settlement_lead_ms=row.settlement_lead_ms,
        settlement_scenes=tuple(row.settlement_scenes),
        validation=_to_validation(json.loads(row.validation)),
    )


def _to_validation(kept: dict[str, Any]) -> Validation:
    """Return the validation of a program as it is kept; a row of an earlier release lacks the newest fields."""
    channels = tuple(map(Channel, kept["channels"]))
    sms_number_types = tuple(map(PhoneNumberType, kept.get("sms_number_types", ())))
    return Validation(**{**kept, "channels": channels, "sms_number_types": sms_number_types})
