"""Steps of migrations that commit one by one, so that reads and writes continue.

They are for migrations with `in_transaction = False`. Each can be repeated: a migration that was interrupted starts
again from its first step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from alembic import op
from sqlalchemy import column, select, table, text, tuple_, update
from sqlalchemy.exc import DBAPIError

LOCK_TIMEOUT = "1s"
"""How long a migration waits for a lock at a time; less than a health check may take, which can wait behind it."""
BATCH_ROWS = 1_000
_WAIT_WITHOUT_LIMIT = "SET lock_timeout = 0"
"""For statements that wait for other transactions, while no call waits behind them."""
_IS_INVALID = text("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")


def create_index(name: str, definition: str, *, unique: bool = False) -> None:
    """Build an index without blocking writes, unless it exists.

    `definition` is what follows ON: the table, its columns and a condition. An invalid index, which an interrupted
    build leaves, is built again. A build that fails drops its index: an invalid unique one would refuse writes.
    """
    if op.get_bind().scalar(_IS_INVALID, {"name": name}):
        drop_index(name)
    op.execute(_WAIT_WITHOUT_LIMIT)
    kind = "UNIQUE INDEX" if unique else "INDEX"
    try:
        op.execute(f"CREATE {kind} CONCURRENTLY IF NOT EXISTS {name} ON {definition}")
    except DBAPIError as error:
        if not error.connection_invalidated:
            drop_index(name)
        raise


def drop_index(name: str) -> None:
    """Drop an index without blocking reads and writes, if it exists."""
    op.execute(_WAIT_WITHOUT_LIMIT)
    op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")


def backfill(
    table_name: str, key: Sequence[str], changes: Mapping[str, str], condition: str, *, batch_rows: int = BATCH_ROWS
) -> None:
    """Change all rows that fulfil a condition, in batches that commit by themselves.

    `key` are the columns of a unique index, in whose order the rows are read, and `changes` the SQL expression of each
    changed column. The condition excludes rows that have been changed, so that a repetition continues.
    """
    op.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
    rows = table(table_name, *map(column, [*key, *changes]))
    columns = [rows.c[name] for name in key]
    values: dict[Any, Any] = {name: text(expression) for name, expression in changes.items()}
    position = tuple_(*columns)
    connection, last = op.get_bind(), None
    while True:
        page = select(*columns).order_by(*columns).offset(batch_rows - 1).limit(1)
        batch = update(rows).values(values).where(text(condition))
        if last is not None:
            page, batch = page.where(position > last), batch.where(position > last)
        end = connection.execute(page).first()
        if end is None:
            # Fewer rows than a batch are left.
            connection.execute(batch)
            return
        connection.execute(batch.where(position <= tuple_(*end)))
        last = tuple_(*end)
