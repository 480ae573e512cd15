"""Bearer tokens."""

from collections.abc import Sequence
from dataclasses import replace

from pointbook_server.access.model import Scope
from pointbook_server.access.rules import new_token, split_bearer
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.db.database import Database
from support.clocks import NOW_MS


async def make_token(
    database_url: str,
    merchants: list[str],
    scopes: list[Scope],
    expires_at_ms: int | None = None,
    *,
    client_names: Sequence[str] = (),
    revoked_at_ms: int | None = None,
) -> str:
    """Create a token in a database, and return its bearer string."""
    database = Database(database_url, pool_size=1)
    token, bearer = new_token("test", merchants, scopes, 0, expires_at_ms, client_names=client_names)
    await TokenTransactions(database).create(replace(token, revoked_at_ms=revoked_at_ms))
    await database.dispose()
    return bearer


async def revoke_token(database_url: str, bearer: str) -> None:
    """Revoke a token over another database connection, as an operator does."""
    database = Database(database_url, pool_size=1)
    assert await TokenTransactions(database).revoke(split_bearer(bearer)[0], NOW_MS)
    await database.dispose()
