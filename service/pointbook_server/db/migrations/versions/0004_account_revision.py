"""A revision of each account, for optimistic writes after a read without a lock."""

from alembic import op

revision = "0004"
down_revision = "0003"

STATEMENTS = (
    "ALTER TABLE points_accounts ADD COLUMN revision bigint NOT NULL DEFAULT 0",
    """
    COMMENT ON COLUMN points_accounts.revision IS
    'Grows with every write: who read the account without locking it sees whether it has changed.'
    """,
)


def upgrade() -> None:
    """Add the column."""
    for statement in STATEMENTS:
        op.execute(statement)
