"""Deletion of stored refusals, so that an event judged again can reuse its id."""

from alembic import op

revision = "0015"
down_revision = "0014"

STATEMENTS = (
    "DROP TRIGGER points_entries_no_delete ON points_entries",
    """
    CREATE TRIGGER points_entries_no_delete BEFORE DELETE ON points_entries FOR EACH ROW
    WHEN (OLD.outcome <> 'REFUSED')
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
)


def upgrade() -> None:
    """Replace the trigger."""
    for statement in STATEMENTS:
        op.execute(statement)
