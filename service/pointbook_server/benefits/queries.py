"""SQL of benefits and custom privileges."""

import json
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import Boolean, Text, and_, any_, bindparam, delete, or_, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.elements import ColumnElement

from pointbook_server.benefits.model import Benefit, CustomPrivilege
from pointbook_server.db.database import Row, Statement
from pointbook_server.db.row_writes import insert_row, update_row
from pointbook_server.db.tables import benefits, custom_privileges

COLUMNS = tuple(column.name for column in benefits.c if column.name not in {"details", "revision", "updated_at_ms"})
"""The fields of a benefit that have a column; all others are in `details`."""
DEFAULTS = {field.name: field.default for field in fields(Benefit)}
LISTS = {name for name, default in DEFAULTS.items() if default == ()}


def _matches(column: ColumnElement[str], name: str) -> ColumnElement[bool]:
    """Return a filter by a column, which an empty parameter disables.

    With the parameter `matches_unset`, an empty column matches as well.
    """
    value = bindparam(name, type_=Text)
    return or_(value == "", column == value, bindparam("matches_unset", type_=Boolean) & (column == ""))


IS_BENEFIT = and_(benefits.c.benefit_id == bindparam("benefit"), benefits.c.merchant_id == bindparam("merchant"))
_store, _stores = bindparam("store", type_=Text), bindparam("program_stores", type_=ARRAY(Text))
IS_FOR_ALL_STORES = benefits.c.store_ids == text("'{}'")
"""A benefit that lists no stores is for all stores."""
INSERT_BENEFIT = Statement(insert_row(benefits))
UPDATE_BENEFIT = Statement(update_row(benefits, IS_BENEFIT))
READ_BENEFIT = Statement(select(benefits).where(IS_BENEFIT))
LOCK_BENEFIT = Statement(select(benefits.c.revision).where(IS_BENEFIT).with_for_update())
DELETE_BENEFIT = Statement(delete(benefits).where(IS_BENEFIT))
LIST_BENEFITS = Statement(
    select(benefits)
    .where(
        benefits.c.merchant_id == bindparam("merchant"),
        benefits.c.benefit_id > bindparam("after"),
        or_(_store == "", IS_FOR_ALL_STORES, _store == any_(benefits.c.store_ids)),
        or_(_stores.is_(None), IS_FOR_ALL_STORES, benefits.c.store_ids.overlap(_stores)),
        _matches(benefits.c.level_code, "level_code"),
        _matches(benefits.c.membership_type, "membership_type"),
        _matches(benefits.c.reward_scene, "reward_scene"),
        _matches(benefits.c.reward_type, "reward_type"),
        _matches(benefits.c.benefits_status, "benefits_status"),
    )
    .order_by(benefits.c.benefit_id)
    .limit(bindparam("limit"))
)


IS_PRIVILEGE = and_(
    custom_privileges.c.privilege_id == bindparam("privilege"), custom_privileges.c.merchant_id == bindparam("merchant")
)
PRIVILEGE_COLUMNS = tuple(field.name for field in fields(CustomPrivilege))
INSERT_PRIVILEGE = Statement(insert_row(custom_privileges))
UPDATE_PRIVILEGE = Statement(update_row(custom_privileges, IS_PRIVILEGE))
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


def benefit_columns(benefit: Benefit) -> dict[str, Any]:
    """Return the columns of a benefit, except revision and time."""
    values = asdict(benefit)
    columns = {name: values.pop(name) for name in COLUMNS}
    present = {name: value for name, value in values.items() if value != DEFAULTS[name]}
    return {**columns, "irrelevant_values": json.dumps(benefit.irrelevant_values), "details": json.dumps(present)}


def read_benefit(row: Row) -> Benefit:
    """Return the benefit of a row."""
    values = {name: row[name] for name in COLUMNS}
    values |= json.loads(row["details"])
    for name in LISTS & values.keys():
        values[name] = tuple(values[name])
    values["irrelevant_values"] = json.loads(values["irrelevant_values"])
    return Benefit(**values)


def read_privilege(row: Row) -> CustomPrivilege:
    """Return the custom privilege of a row."""
    return CustomPrivilege(**{name: row[name] for name in PRIVILEGE_COLUMNS})
