"""The audit of one-time codes in the order of time, so that a customer's newest events are read by the key alone."""

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
    """Put the time into the key."""
    for statement in STATEMENTS:
        op.execute(statement)
