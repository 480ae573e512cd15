"""Inserts and updates of one row, with a parameter for each column of its table."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, Table, Update, bindparam, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.dml import ReturningInsert

MERCHANT_COLUMN = "merchant_id"


def insert_row(table: Table, omitted: Collection[str] = ()) -> ReturningInsert[Any]:
    """Return an insert that returns the new row's key, or no row if the key is taken.

    Omitted columns get their defaults.
    """
    return insert(table).values(_parameters(table, omitted)).on_conflict_do_nothing().returning(_key(table)[0])


def update_row(table: Table, condition: ColumnElement[bool], omitted: Collection[str] = ()) -> Update:
    """Return an update of all columns but omitted ones, the key and the merchant.

    Citus refuses to change the latter.
    """
    kept = {column.name for column in _key(table)} | {MERCHANT_COLUMN, *omitted}
    return update(table).where(condition).values(_parameters(table, kept))


def _parameters(table: Table, kept: Collection[str] = ()) -> dict[str, Any]:
    """Return a parameter for each column that is not kept, by its name."""
    return {column.name: bindparam(column.name) for column in table.c if column.name not in kept}


def _key(table: Table) -> list[Any]:
    return [column for column in table.primary_key if column.name != MERCHANT_COLUMN]
