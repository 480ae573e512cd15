"""The SQL of tokens."""

from dataclasses import asdict

from sqlalchemy import bindparam, insert, select, update

from pointbook_server.access.model import Token
from pointbook_server.database import Database, Row, Statement
from pointbook_server.tables import api_tokens

INSERT_TOKEN = Statement(insert(api_tokens))
READ_TOKENS = Statement(select(api_tokens).order_by(api_tokens.c.created_at_ms, api_tokens.c.token_id))
REVOKE_TOKEN = Statement(
    update(api_tokens)
    .where(api_tokens.c.token_id == bindparam("token"), api_tokens.c.revoked_at_ms.is_(None))
    .values(revoked_at_ms=bindparam("now"))
)


class AccessStore:
    """Reads and writes tokens: a small table that is read whole."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, token: Token) -> None:
        """Keep a new token."""
        async with self._database.autocommit() as connection:
            await connection.execute(INSERT_TOKEN, asdict(token))

    async def tokens(self) -> list[Token]:
        """Read all tokens, the oldest first."""
        async with self._database.autocommit() as connection:
            return [_to_token(row) for row in await connection.fetch(READ_TOKENS)]

    async def revoke(self, token_id: str, now_ms: int) -> bool:
        """Revoke a token for good; False where there is none that is not revoked yet."""
        async with self._database.autocommit() as connection:
            return await connection.execute(REVOKE_TOKEN, {"token": token_id, "now": now_ms}) == 1


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
    )
