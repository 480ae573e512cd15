"""The database's types of rows have the columns that statements write."""

from types import ModuleType

import asyncpg
import pytest

from pointbook_server.ledger import queries as ledger
from pointbook_server.redemption import queries as redemptions
from pointbook_server.validation_codes import queries as codes


@pytest.mark.parametrize("queries", [ledger, redemptions, codes])
async def test_the_types_of_rows_have_the_columns_that_are_written(database_url: str, queries: ModuleType) -> None:
    """The driver sends the values of a row in the order of its type's columns."""
    connection = await asyncpg.connect(database_url)
    for name, columns in queries.ROW_TYPES.items():
        found = await connection.fetch(
            "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
            " WHERE attrelid = CAST($1::text AS regclass) ORDER BY attnum",
            name,
        )
        assert [tuple(row) for row in found] == list(columns.items())
    await connection.close()
