"""Indexes of the times by which rows are deleted, and deletion of an old audit.

Writes to the five tables wait while their index is built; reads continue.
"""

from alembic import op

revision = "0029"
down_revision = "0028"

STATEMENTS = (
    "CREATE INDEX ix_customer_updates_updated ON customer_updates (updated_at_ms, merchant_id) WHERE updated_at_ms > 0",
    "CREATE INDEX ix_customer_audit_at ON customer_audit (at_ms, merchant_id) WHERE at_ms > 0",
    "CREATE INDEX ix_redemption_audit_at ON redemption_audit (at_ms, merchant_id) WHERE at_ms > 0",
    "CREATE INDEX ix_validation_audit_at ON validation_audit (at_ms, merchant_id) WHERE at_ms > 0",
    """
    CREATE INDEX ix_quarantined_webhooks_finished
    ON quarantined_webhooks (greatest(last_received_at_ms, replayed_at_ms), merchant_id)
    WHERE state = 'REPLAYED' OR body IS NULL
    """,
    "DROP TRIGGER customer_audit_no_change ON customer_audit",
    """
    CREATE TRIGGER customer_audit_no_update BEFORE UPDATE ON customer_audit FOR EACH ROW
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
    """
    CREATE TRIGGER customer_audit_no_delete BEFORE DELETE ON customer_audit FOR EACH ROW
    WHEN (OLD.at_ms > 1000 * extract(epoch FROM now()) - 90 * 86400000::bigint)
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
)


def upgrade() -> None:
    """Create the indexes, and replace the trigger."""
    for statement in STATEMENTS:
        op.execute(statement)
