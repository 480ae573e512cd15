"""The SQL of benefits."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from sqlalchemy import Boolean, Table, Text, and_, any_, bindparam, delete, or_, select, text, update
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.sql.elements import ColumnElement

from pointbook_server.benefits.model import (
    Benefit,
    CustomPrivilege,
    benefit_not_found,
    custom_privilege_not_found,
)
from pointbook_server.db.database import Connection, Database, RetryTransactionError, Row, Statement
from pointbook_server.db.tables import benefits, custom_privileges
from pointbook_server.errors import first_revision, next_revision, store_not_found
from pointbook_server.programs.model import Program, program_not_found

COLUMNS = tuple(column.name for column in benefits.c if column.name not in {"details", "revision", "updated_at_ms"})
"""The fields of a benefit that have columns of their own; all others are in `details`."""
DEFAULTS = {field.name: field.default for field in fields(Benefit)}
LISTS = {name for name, default in DEFAULTS.items() if default == ()}


def _fits(column: ColumnElement[str], name: str) -> ColumnElement[bool]:
    """Filter by a column where the filter is set, letting through what leaves it open where `open` says so."""
    wanted = bindparam(name, type_=Text)
    return or_(wanted == "", column == wanted, bindparam("open", type_=Boolean) & (column == ""))


IS_BENEFIT = and_(benefits.c.benefit_id == bindparam("benefit"), benefits.c.merchant_id == bindparam("merchant"))
_store, _stores = bindparam("store", type_=Text), bindparam("program_stores", type_=ARRAY(Text))
IS_EVERYWHERE = benefits.c.store_ids == text("'{}'")
"""A benefit that names no store is every store's."""
READ_BENEFIT = Statement(select(benefits).where(IS_BENEFIT))
LOCK_BENEFIT = Statement(select(benefits.c.revision).where(IS_BENEFIT).with_for_update())
DELETE_BENEFIT = Statement(delete(benefits).where(IS_BENEFIT))
LIST_BENEFITS = Statement(
    select(benefits)
    .where(
        benefits.c.merchant_id == bindparam("merchant"),
        benefits.c.benefit_id > bindparam("after"),
        or_(_store == "", IS_EVERYWHERE, _store == any_(benefits.c.store_ids)),
        or_(_stores.is_(None), IS_EVERYWHERE, benefits.c.store_ids.overlap(_stores)),
        _fits(benefits.c.level_code, "level_code"),
        _fits(benefits.c.membership_type, "membership_type"),
        _fits(benefits.c.reward_scene, "reward_scene"),
        _fits(benefits.c.reward_type, "reward_type"),
        _fits(benefits.c.benefits_status, "benefits_status"),
    )
    .order_by(benefits.c.benefit_id)
    .limit(bindparam("limit"))
)


IS_PRIVILEGE = and_(
    custom_privileges.c.privilege_id == bindparam("privilege"), custom_privileges.c.merchant_id == bindparam("merchant")
)
PRIVILEGE_COLUMNS = tuple(field.name for field in fields(CustomPrivilege))
READ_PRIVILEGE = Statement(select(custom_privileges).where(IS_PRIVILEGE))
LOCK_PRIVILEGE = Statement(select(custom_privileges.c.revision).where(IS_PRIVILEGE).with_for_update())
DELETE_PRIVILEGE = Statement(delete(custom_privileges).where(IS_PRIVILEGE))
_level = bindparam("level_code", type_=Text)
LIST_PRIVILEGES = Statement(
    select(custom_privileges)
    .where(
        custom_privileges.c.merchant_id == bindparam("merchant"),
        custom_privileges.c.privilege_id > bindparam("after"),
        or_(_level == "", custom_privileges.c.level_code == _level),
    )
    .order_by(custom_privileges.c.privilege_id)
    .limit(bindparam("limit"))
)


@dataclass(frozen=True, slots=True)
class BenefitFilter:
    """Which benefits of a merchant to list; an empty value keeps all.

    With `open`, a benefit that leaves something open fits whatever is asked for.
    """

    store_id: str = ""
    program_id: int = 0
    level_code: str = ""
    membership_type: str = ""
    reward_scene: str = ""
    reward_type: str = ""
    benefits_status: str = ""
    open: bool = False


class Programs(Protocol):
    """Where stores and programs are kept."""

    async def own_stores(
        self, connection: Connection, merchant_id: str, store_ids: Collection[str], *, is_update: bool = False
    ) -> set[str]:
        """Return which stores are the merchant's; for an update they stay so until its transaction ends."""

    async def read(self, connection: Connection, merchant_id: str, program_ids: Collection[int]) -> dict[int, Program]:
        """Read programs, as far as the merchant has them."""


class BenefitTransactions:
    """Reads and writes benefits and custom privileges. A revision counts up with every change, and is the etag.

    A new one begins anywhere, so that an etag of a deleted one is none of the one that takes its id.
    """

    def __init__(self, database: Database, programs: Programs) -> None:
        self._database = database
        self._programs = programs

    async def put(self, benefit: Benefit, expected_revision: int | None, now_ms: int) -> int:
        """Create or replace a benefit, and return its revision.

        Raises STORE_NOT_FOUND for a store that is not the merchant's, and STALE_ETAG where another revision was
        expected.
        """
        named = {"benefit": benefit.benefit_id, "merchant": benefit.merchant_id}

        async def work(connection: Connection) -> int:
            await self._check_stores(connection, benefit.merchant_id, benefit.store_ids, is_update=True)
            kept = await connection.fetch_one(LOCK_BENEFIT, named)
            revision = _revision_after(kept, expected_revision)
            values = {**_to_row(benefit), "revision": revision, "updated_at_ms": now_ms}
            await _replace(connection, benefits, IS_BENEFIT, named, values, is_new=kept is None)
            return revision

        return await self._database.transaction(work)

    async def benefit(self, merchant_id: str, benefit_id: str) -> tuple[Benefit, int]:
        """Read one benefit and its revision. Raises BENEFIT_NOT_FOUND."""
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(READ_BENEFIT, {"benefit": benefit_id, "merchant": merchant_id})
        if row is None:
            raise benefit_not_found(benefit_id)
        return _to_benefit(row), row.revision

    async def benefits(self, merchant_id: str, wanted: BenefitFilter, *, after: str, limit: int) -> list[Benefit]:
        """Read a page of a merchant's benefits, behind a benefit_id.

        Raises STORE_NOT_FOUND and PROGRAM_NOT_FOUND for what is not the merchant's.
        """
        async with self._database.autocommit() as connection:
            await self._check_stores(connection, merchant_id, [wanted.store_id] if wanted.store_id else [])
            place = {
                **asdict(wanted),
                "merchant": merchant_id,
                "store": wanted.store_id,
                "program_stores": await self._program_stores(connection, merchant_id, wanted.program_id),
                "after": after,
                "limit": limit,
            }
            return [_to_benefit(row) for row in await connection.fetch(LIST_BENEFITS, place)]

    async def delete(self, merchant_id: str, benefit_id: str, expected_revision: int | None) -> None:
        """Delete a benefit. Raises BENEFIT_NOT_FOUND and STALE_ETAG."""
        named = {"benefit": benefit_id, "merchant": merchant_id}

        async def work(connection: Connection) -> None:
            kept = await connection.fetch_one(LOCK_BENEFIT, named)
            if kept is None:
                raise benefit_not_found(benefit_id)
            next_revision(kept.revision, expected_revision)
            await connection.execute(DELETE_BENEFIT, named)

        await self._database.transaction(work)

    async def put_privilege(self, privilege: CustomPrivilege, expected_revision: int | None, now_ms: int) -> int:
        """Create or replace a custom privilege, and return its revision. Raises STALE_ETAG."""
        named = {"privilege": privilege.privilege_id, "merchant": privilege.merchant_id}

        async def work(connection: Connection) -> int:
            kept = await connection.fetch_one(LOCK_PRIVILEGE, named)
            revision = _revision_after(kept, expected_revision)
            values = {**asdict(privilege), "revision": revision, "updated_at_ms": now_ms}
            await _replace(connection, custom_privileges, IS_PRIVILEGE, named, values, is_new=kept is None)
            return revision

        return await self._database.transaction(work)

    async def privilege(self, merchant_id: str, privilege_id: str) -> tuple[CustomPrivilege, int]:
        """Read one custom privilege and its revision. Raises CUSTOM_PRIVILEGE_NOT_FOUND."""
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(READ_PRIVILEGE, {"privilege": privilege_id, "merchant": merchant_id})
        if row is None:
            raise custom_privilege_not_found(privilege_id)
        return _to_privilege(row), row.revision

    async def privileges(self, merchant_id: str, level_code: str, *, after: str, limit: int) -> list[CustomPrivilege]:
        """Read a page of custom privileges, behind a privilege_id; an empty level means all."""
        place = {"merchant": merchant_id, "level_code": level_code, "after": after, "limit": limit}
        async with self._database.autocommit() as connection:
            return [_to_privilege(row) for row in await connection.fetch(LIST_PRIVILEGES, place)]

    async def delete_privilege(self, merchant_id: str, privilege_id: str, expected_revision: int | None) -> None:
        """Delete a custom privilege. Raises CUSTOM_PRIVILEGE_NOT_FOUND and STALE_ETAG."""
        named = {"privilege": privilege_id, "merchant": merchant_id}

        async def work(connection: Connection) -> None:
            kept = await connection.fetch_one(LOCK_PRIVILEGE, named)
            if kept is None:
                raise custom_privilege_not_found(privilege_id)
            next_revision(kept.revision, expected_revision)
            await connection.execute(DELETE_PRIVILEGE, named)

        await self._database.transaction(work)

    async def _check_stores(
        self, connection: Connection, merchant_id: str, store_ids: Sequence[str], *, is_update: bool = False
    ) -> None:
        """Raise STORE_NOT_FOUND for the first store that is not the merchant's."""
        known: set[str] = set()
        if store_ids:
            known = await self._programs.own_stores(connection, merchant_id, store_ids, is_update=is_update)
        for store_id in store_ids:
            if store_id not in known:
                raise store_not_found(store_id)

    async def _program_stores(self, connection: Connection, merchant_id: str, program_id: int) -> list[str] | None:
        """Read the stores of a program; None where no program is named."""
        if not program_id:
            return None
        programs = await self._programs.read(connection, merchant_id, [program_id])
        if program_id not in programs:
            raise program_not_found(program_id)
        return list(programs[program_id].store_ids)


def _revision_after(kept: Row | None, expected_revision: int | None) -> int:
    """Return the revision of what is about to be put. Raises STALE_ETAG."""
    revision = next_revision(0 if kept is None else kept.revision, expected_revision)
    return first_revision() if kept is None else revision


async def _replace(
    connection: Connection,
    table: Table,
    is_it: ColumnElement[bool],
    named: dict[str, str],
    values: dict[str, Any],
    *,
    is_new: bool,
) -> None:
    """Write the row of what is locked, or of what is new."""
    if not is_new:
        await connection.execute(Statement(update(table).where(is_it).values(values)), named)
    elif not await connection.execute(Statement(insert(table).values(values).on_conflict_do_nothing())):
        raise RetryTransactionError  # Another call has just created it: replace that.


def _to_privilege(row: Row) -> CustomPrivilege:
    return CustomPrivilege(**{name: row[name] for name in PRIVILEGE_COLUMNS})


def _to_row(benefit: Benefit) -> dict[str, Any]:
    values = asdict(benefit)
    row = {name: values.pop(name) for name in COLUMNS}
    present = {name: value for name, value in values.items() if value != DEFAULTS[name]}
    return {**row, "irrelevant_values": json.dumps(benefit.irrelevant_values), "details": json.dumps(present)}


def _to_benefit(row: Row) -> Benefit:
    values = {name: row[name] for name in COLUMNS}
    values |= json.loads(row["details"])
    for name in LISTS & values.keys():
        values[name] = tuple(values[name])
    values["irrelevant_values"] = json.loads(values["irrelevant_values"])
    return Benefit(**values)
