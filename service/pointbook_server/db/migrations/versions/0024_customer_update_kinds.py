"""Whether a customer webhook was a deletion, whose body looks like an update."""

from alembic import op

revision = "0024"
down_revision = "0023"

STATEMENTS = (
    "ALTER TABLE customer_updates ADD COLUMN is_deletion boolean",
    """
    COMMENT ON COLUMN customer_updates.is_deletion IS
    'NULL for redactions, whose body no other topic has, and for webhooks of earlier releases.'
    """,
)


def upgrade() -> None:
    """Add the column."""
    for statement in STATEMENTS:
        op.execute(statement)
