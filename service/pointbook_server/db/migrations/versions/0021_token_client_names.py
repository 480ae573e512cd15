"""Tokens bound to the names of client certificates."""

from alembic import op

revision = "0021"
down_revision = "0020"

STATEMENTS = (
    "ALTER TABLE api_tokens ADD COLUMN client_names text[] NOT NULL DEFAULT '{}'::text[]",
    """
    COMMENT ON COLUMN api_tokens.client_names IS
    'Names of client certificates, of which a caller must have one; empty where any caller may use it.'
    """,
)


def upgrade() -> None:
    """Add the column."""
    for statement in STATEMENTS:
        op.execute(statement)
