"""Command tags of PostgreSQL as Citus reports them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import asyncpg

INSERTS_SELECTED_ROWS = re.compile(r"^\s*INSERT\b.*\bSELECT\b.*\bON CONFLICT\b", re.DOTALL)


@contextmanager
def tags_count_selected_rows() -> Iterator[None]:
    """Report the rows selected by INSERT ... SELECT ... ON CONFLICT as written.

    The rows come from array parameters, so there are as many as the longest array has elements.
    """
    execute = asyncpg.Connection.execute

    async def execute_as_citus(self: Any, query: str, *args: Any, **options: Any) -> Any:
        tag = await execute(self, query, *args, **options)
        if not INSERTS_SELECTED_ROWS.search(query):
            return tag
        return f"INSERT 0 {max(len(each) for each in args if isinstance(each, list))}"

    with patch.object(asyncpg.Connection, "execute", execute_as_citus):
        yield
