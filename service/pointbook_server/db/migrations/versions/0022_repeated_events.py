"""A live missed call next to a live sent code; one row for repeated events."""

from alembic import op

revision = "0022"
down_revision = "0021"

STATEMENTS = (
    """
    ALTER TABLE validation_audit
    ADD COLUMN event_count bigint NOT NULL DEFAULT 1,
    ADD COLUMN last_at_ms bigint,
    ADD COLUMN repeat_key text NOT NULL DEFAULT ''
    """,
    "COMMENT ON COLUMN validation_audit.last_at_ms IS 'When it happened last, where it was repeated.'",
    """
    COMMENT ON COLUMN validation_audit.repeat_key IS
    'What repetitions that are counted in one row have in common; empty for a row that is none of these.'
    """,
    """
    CREATE UNIQUE INDEX uq_validation_audit_repeated
    ON validation_audit (customer, merchant_id, repeat_key) WHERE repeat_key <> ''
    """,
    "DROP INDEX uq_validation_challenges_live",
    """
    CREATE UNIQUE INDEX uq_validation_challenges_live
    ON validation_challenges (customer, merchant_id, (channel = 'MISSED_CALL')) WHERE state = 'LIVE'
    """,
)


def upgrade() -> None:
    """Add the columns and replace the index."""
    for statement in STATEMENTS:
        op.execute(statement)
