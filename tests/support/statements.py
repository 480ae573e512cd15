"""Which statements a call sends to the database."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from pointbook_server.db.database import Connection
from support.harness import Shop


@contextmanager
def counted_statements(shop: Shop) -> Iterator[list[str]]:
    """Collect the statements about a shop's merchant that are sent while the block runs, and no others'."""
    sent: list[str] = []

    def count(statement: Any, values: Any) -> None:
        if shop.merchant_id in (values or {}).values():
            sent.append(statement.sql)

    fetch, fetch_one = Connection.fetch, Connection.fetch_one

    async def counting_fetch(self: Connection, statement: Any, values: Any = None) -> Any:
        count(statement, values)
        return await fetch(self, statement, values)

    async def counting_fetch_one(self: Connection, statement: Any, values: Any = None) -> Any:
        count(statement, values)
        return await fetch_one(self, statement, values)

    with patch.object(Connection, "fetch", counting_fetch), patch.object(Connection, "fetch_one", counting_fetch_one):
        yield sent
