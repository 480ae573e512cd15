"""The statements that a call sends to the database."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from pointbook_server.db.database import Connection
from support.shops import Shop


@contextmanager
def recorded_statements(shop: Shop) -> Iterator[list[str]]:
    """Collect the statements about a shop's merchant that the block sends."""
    sent: list[str] = []

    def record(statement: Any, values: Any) -> None:
        if shop.merchant_id in (values or {}).values():
            sent.append(statement.sql)

    fetch, fetch_one = Connection.fetch, Connection.fetch_one

    async def recording_fetch(self: Connection, statement: Any, values: Any = None) -> Any:
        record(statement, values)
        return await fetch(self, statement, values)

    async def recording_fetch_one(self: Connection, statement: Any, values: Any = None) -> Any:
        record(statement, values)
        return await fetch_one(self, statement, values)

    with patch.object(Connection, "fetch", recording_fetch), patch.object(Connection, "fetch_one", recording_fetch_one):
        yield sent
