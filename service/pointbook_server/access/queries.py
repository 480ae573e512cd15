"""SQL of tokens: a small table that is read whole."""

from sqlalchemy import bindparam, insert, select, text, update

from pointbook_server.access.model import Token
from pointbook_server.db.database import Row, Statement
from pointbook_server.db.tables import api_tokens

INSERT_TOKEN = Statement(insert(api_tokens))
READ_TOKENS = Statement(select(api_tokens).order_by(api_tokens.c.created_at_ms, api_tokens.c.token_id))
REVOKE_TOKEN = Statement(
    update(api_tokens)
    .where(api_tokens.c.token_id == bindparam("token"), api_tokens.c.revoked_at_ms.is_(None))
    .values(revoked_at_ms=bindparam("now"))
    .returning(api_tokens.c.token_id)
)
LOCK_TOKEN = Statement(select(api_tokens).where(api_tokens.c.token_id == bindparam("token")).with_for_update())
ROTATE_TOKEN = Statement(
    update(api_tokens)
    .where(api_tokens.c.token_id == bindparam("token"))
    .values(expires_at_ms=bindparam("expires"), rotated_to=bindparam("new_token"))
)
_USED_TOKENS = "unnest(CAST(:token_ids AS text[]), CAST(:times AS bigint[])) AS v (token_id, used_at_ms)"
# Several servers use the same token: a server neither repeats a write of the last minute nor waits for another one's.
# The order of the parameters is the order of locking.
WRITE_LAST_USED = Statement(
    text(f"""
    UPDATE api_tokens AS t SET last_used_at_ms = v.used_at_ms FROM {_USED_TOKENS}
    WHERE t.token_id = v.token_id AND t.token_id = ANY(ARRAY(
        SELECT a.token_id FROM {_USED_TOKENS} CROSS JOIN LATERAL (
            SELECT token_id FROM api_tokens
            WHERE token_id = v.token_id AND coalesce(last_used_at_ms, 0) + :gap_ms <= v.used_at_ms
            FOR UPDATE SKIP LOCKED
        ) AS a
    ))
""")
)


def read_token(row: Row) -> Token:
    """Return the token of a row."""
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
