"""Remembered refusals, which are no entries of the book, can be deleted: an event that is judged anew takes its id."""

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
