"""Rows of customer_audit can be deleted once they are 90 days old.

Replacing the trigger takes a moment.
"""

from alembic import op

revision = "0031"
down_revision = "0030"

STATEMENTS = (
    """
    CREATE OR REPLACE TRIGGER customer_audit_no_change BEFORE UPDATE ON customer_audit FOR EACH ROW
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
    """
    CREATE TRIGGER customer_audit_no_delete BEFORE DELETE ON customer_audit FOR EACH ROW
    WHEN (OLD.at_ms > 1000 * extract(epoch FROM now()) - 90 * 86400000::bigint)
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
)


def upgrade() -> None:
    """Replace the trigger."""
    for statement in STATEMENTS:
        op.execute(statement)
