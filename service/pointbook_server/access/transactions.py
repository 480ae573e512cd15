"""Transactions of tokens."""

from collections.abc import Mapping
from dataclasses import asdict

from pointbook_common.durations import MINUTE_MS
from pointbook_server.access import queries
from pointbook_server.access.model import Token
from pointbook_server.access.rules import rotate
from pointbook_server.db.database import Connection, Database

LAST_USED_INTERVAL_MS = MINUTE_MS
"""The least time between two writes of a token's last use."""


class NotRotatableError(Exception):
    """A token that cannot be rotated; the message says why."""


class TokenTransactions:
    """Reads and writes tokens."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, token: Token) -> None:
        """Insert a new token."""
        async with self._database.autocommit() as connection:
            await connection.execute(queries.INSERT_TOKEN, asdict(token))

    async def read_all(self) -> list[Token]:
        """Return all tokens, the oldest first, over a connection that no call uses."""
        async with self._database.reserve() as connection:
            return await read_tokens(connection)

    def note_timeout(self, error: TimeoutError) -> None:
        """Count a `read_all` that its caller has given up as a failure of the database."""
        self._database.note_outage(error)

    async def revoke(self, token_id: str, now_ms: int) -> bool:
        """Revoke a token for good; return False if there is nothing to revoke."""
        async with self._database.autocommit() as connection:
            return await connection.count_written(queries.REVOKE_TOKEN, {"token": token_id, "now": now_ms}) == 1

    async def rotate(self, token_id: str, now_ms: int, overlap_ms: int) -> tuple[Token, Token, str]:
        """Replace a token, and return the old one, the new one, and its bearer string.

        Raises NotRotatableError.
        """

        async def work(connection: Connection) -> tuple[Token, Token, str]:
            row = await connection.fetch_one(queries.LOCK_TOKEN, {"token": token_id})
            token = None if row is None else queries.read_token(row)
            if token is None:
                raise NotRotatableError("does not exist")
            if obstacle := token.rotation_obstacle(now_ms):
                raise NotRotatableError(obstacle)
            old, new, bearer = rotate(token, now_ms, overlap_ms)
            params = {"token": token_id, "expires": old.expires_at_ms, "new_token": new.token_id}
            await connection.execute(queries.ROTATE_TOKEN, params)
            await connection.execute(queries.INSERT_TOKEN, asdict(new))
            return old, new, bearer

        return await self._database.transaction(work)

    async def write_last_used(self, used_at_ms: Mapping[str, int]) -> None:
        """Write when tokens were last used.

        A token's time is written at most once in LAST_USED_INTERVAL_MS.
        """
        token_ids = sorted(used_at_ms)
        params = {
            "token_ids": token_ids,
            "times": [used_at_ms[token_id] for token_id in token_ids],
            "gap_ms": LAST_USED_INTERVAL_MS,
        }
        async with self._database.autocommit() as connection:
            await connection.execute(queries.WRITE_LAST_USED, params)


async def read_tokens(connection: Connection) -> list[Token]:
    """Return all tokens, the oldest first."""
    return [queries.read_token(row) for row in await connection.fetch(queries.READ_TOKENS)]
