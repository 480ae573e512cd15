"""The last use of each token, and the token that replaced it."""

from alembic import op

revision = "0018"
down_revision = "0017"

STATEMENTS = (
    "ALTER TABLE api_tokens ADD COLUMN last_used_at_ms bigint, ADD COLUMN rotated_to text",
    "COMMENT ON COLUMN api_tokens.last_used_at_ms IS 'To the minute; NULL where it was never used.'",
    "COMMENT ON COLUMN api_tokens.rotated_to IS 'The token that replaced it; NULL where none has.'",
)


def upgrade() -> None:
    """Add the columns."""
    for statement in STATEMENTS:
        op.execute(statement)
