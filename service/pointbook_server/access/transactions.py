"""The SQL of tokens."""

from collections.abc import Mapping
from dataclasses import asdict

from sqlalchemy import bindparam, insert, select, text, update

from pointbook_server.access.model import Token, rotated
from pointbook_server.db.database import Connection, Database, Row, Statement
from pointbook_server.db.tables import api_tokens

INSERT_TOKEN = Statement(insert(api_tokens))
READ_TOKENS = Statement(select(api_tokens).order_by(api_tokens.c.created_at_ms, api_tokens.c.token_id))
REVOKE_TOKEN = Statement(
    update(api_tokens)
    .where(api_tokens.c.token_id == bindparam("token"), api_tokens.c.revoked_at_ms.is_(None))
    .values(revoked_at_ms=bindparam("now"))
)
LOCK_TOKEN = Statement(select(api_tokens).where(api_tokens.c.token_id == bindparam("token")).with_for_update())
ROTATE_TOKEN = Statement(
    update(api_tokens)
    .where(api_tokens.c.token_id == bindparam("token"))
    .values(expires_at_ms=bindparam("expires"), rotated_to=bindparam("new_token"))
)
# Several servers use a token: none writes what another one wrote within the last minute, or waits for it.
USED_AT_MS = "(CAST(:times AS bigint[]))[array_position(CAST(:token_ids AS text[]), token_id)]"
WRITE_USE = Statement(
    text(f"""
    UPDATE api_tokens SET last_used_at_ms = {USED_AT_MS} WHERE token_id = ANY(ARRAY(
        SELECT token_id FROM api_tokens
        WHERE token_id = ANY(CAST(:token_ids AS text[])) AND coalesce(last_used_at_ms, 0) + :pause_ms <= {USED_AT_MS}
        ORDER BY token_id FOR UPDATE SKIP LOCKED
    ))
""")  # noqa: S608 - there is nothing in it but our own text
)
USE_PAUSE_MS = 60_000
"""How long a token's last use is not written again."""


class NotRotatableError(Exception):
    """A token that cannot be replaced; the message says why."""


class TokenTransactions:
    """Reads and writes tokens: a small table that is read whole."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, token: Token) -> None:
        """Keep a new token."""
        async with self._database.autocommit() as connection:
            await connection.execute(INSERT_TOKEN, asdict(token))

    async def tokens(self) -> list[Token]:
        """Read all tokens, the oldest first, on the connection that calls leave alone."""
        async with self._database.reserve() as connection:
            return [_to_token(row) for row in await connection.fetch(READ_TOKENS)]

    async def revoke(self, token_id: str, now_ms: int) -> bool:
        """Revoke a token for good; False where there is none that is not revoked yet."""
        async with self._database.autocommit() as connection:
            return await connection.execute(REVOKE_TOKEN, {"token": token_id, "now": now_ms}) == 1

    async def rotate(self, token_id: str, now_ms: int, overlap_ms: int) -> tuple[Token, Token, str]:
        """Replace a token by a new one, and return both and the new one's bearer string.

        Raises NotRotatableError.
        """

        async def work(connection: Connection) -> tuple[Token, Token, str]:
            row = await connection.fetch_one(LOCK_TOKEN, {"token": token_id})
            token = None if row is None else _to_token(row)
            if token is None or (why := token.not_rotatable(now_ms)):
                raise NotRotatableError("does not exist" if token is None else why)
            old, new, bearer = rotated(token, now_ms, overlap_ms)
            values = {"token": token_id, "expires": old.expires_at_ms, "new_token": new.token_id}
            await connection.execute(ROTATE_TOKEN, values)
            await connection.execute(INSERT_TOKEN, asdict(new))
            return old, new, bearer

        return await self._database.transaction(work)

    async def write_use(self, used_at_ms: Mapping[str, int]) -> None:
        """Write when tokens were last used, at most once a minute for each."""
        values = {"token_ids": list(used_at_ms), "times": list(used_at_ms.values()), "pause_ms": USE_PAUSE_MS}
        async with self._database.autocommit() as connection:
            await connection.execute(WRITE_USE, values)


def _to_token(row: Row) -> Token:
    return Token(
        token_id=row.token_id,
        secret_hash=row.secret_hash,
        name=row.name,
        merchants=tuple(row.merchants),
        scopes=tuple(row.scopes),
        created_at_ms=row.created_at_ms,
        expires_at_ms=row.expires_at_ms,
        revoked_at_ms=row.revoked_at_ms,
        last_used_at_ms=row.last_used_at_ms,
        rotated_to=row.rotated_to,
        client_names=tuple(row.client_names),
    )
