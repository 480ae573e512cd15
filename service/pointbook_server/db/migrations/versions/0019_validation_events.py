"""The audit of one-time codes in time order.

A customer's newest events are read by the primary key alone.
"""

from alembic import op

revision = "0019"
down_revision = "0018"

STATEMENTS = (
    "ALTER TABLE validation_audit DROP CONSTRAINT pk_validation_audit",
    """
    ALTER TABLE validation_audit
    ADD CONSTRAINT pk_validation_audit PRIMARY KEY (customer, merchant_id, at_ms, audit_id)
    """,
)


def upgrade() -> None:
    """Add the time to the primary key."""
    for statement in STATEMENTS:
        op.execute(statement)
