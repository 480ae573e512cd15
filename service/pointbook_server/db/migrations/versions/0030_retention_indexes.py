"""Indexes of the times by which old rows are deleted.

They are built while reads and writes continue.
"""

from pointbook_server.db.migrations.operations import create_index

revision = "0030"
down_revision = "0029"
in_transaction = False

INDEXES = {
    "ix_customer_updates_updated": "customer_updates (updated_at_ms, merchant_id) WHERE updated_at_ms > 0",
    "ix_customer_audit_at": "customer_audit (at_ms, merchant_id) WHERE at_ms > 0",
    "ix_redemption_audit_at": "redemption_audit (at_ms, merchant_id) WHERE at_ms > 0",
    "ix_validation_audit_at": "validation_audit (at_ms, merchant_id) WHERE at_ms > 0",
    "ix_quarantined_webhooks_finished": """
        quarantined_webhooks (greatest(last_received_at_ms, replayed_at_ms), merchant_id)
        WHERE state = 'REPLAYED' OR body IS NULL
    """,
}


def upgrade() -> None:
    """Build the indexes."""
    for name, definition in INDEXES.items():
        create_index(name, definition)
