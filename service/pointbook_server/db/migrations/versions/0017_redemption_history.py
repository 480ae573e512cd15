"""Actors of redemptions, reversals and closings; points of each reversal."""

from alembic import op

revision = "0017"
down_revision = "0016"

STATEMENTS = (
    "ALTER TABLE redemptions ADD COLUMN actor text NOT NULL DEFAULT ''",
    "COMMENT ON COLUMN redemptions.actor IS 'The id of the caller''s token; empty where there are no tokens.'",
    """
    ALTER TABLE redemption_reversals
        ADD COLUMN redeemer text NOT NULL DEFAULT '',
        ADD COLUMN reversed_points bigint NOT NULL DEFAULT 0,
        ADD COLUMN actor text NOT NULL DEFAULT ''
    """,
    "COMMENT ON COLUMN redemption_reversals.redeemer IS 'Who redeemed, as in redemptions.'",
    "COMMENT ON COLUMN redemption_reversals.reversed_points IS 'What was given back.'",
    "COMMENT ON COLUMN redemption_reversals.actor IS 'The id of the caller''s token; empty where there are no tokens.'",
    """
    CREATE INDEX ix_redemption_reversals_redemption
    ON redemption_reversals (redemption_id, merchant_id, created_at_ms)
    """,
    # At most one reversal of a redemption requested all remaining points, and it was the last.
    """
    UPDATE redemption_reversals AS r SET
        redeemer = d.redeemer,
        reversed_points = CASE WHEN r.points > 0 THEN r.points ELSE d.reversed_points - (
            SELECT coalesce(sum(other.points), 0)::bigint FROM redemption_reversals AS other
            WHERE other.redemption_id = r.redemption_id AND other.merchant_id = r.merchant_id
        ) END
    FROM redemptions AS d WHERE d.redemption_id = r.redemption_id AND d.merchant_id = r.merchant_id
    """,
    """
    CREATE INDEX ix_redemption_reversals_redeemer
    ON redemption_reversals (redeemer, merchant_id, created_at_ms, reference)
    """,
    """
    ALTER TABLE redemption_audit
        ADD COLUMN redeemer text NOT NULL DEFAULT '',
        ADD COLUMN points bigint NOT NULL DEFAULT 0,
        ADD COLUMN actor text NOT NULL DEFAULT ''
    """,
    "COMMENT ON COLUMN redemption_audit.redeemer IS 'Who redeemed, as in redemptions.'",
    "COMMENT ON COLUMN redemption_audit.points IS 'What was settled or released; 0 where it was not kept.'",
    """
    COMMENT ON COLUMN redemption_audit.actor IS
    'The id of the caller''s token; empty where there are no tokens, and where time did it.'
    """,
    """
    UPDATE redemption_audit AS a SET redeemer = d.redeemer
    FROM redemptions AS d WHERE d.redemption_id = a.redemption_id AND d.merchant_id = a.merchant_id
    """,
    "CREATE INDEX ix_redemption_audit_redeemer ON redemption_audit (redeemer, merchant_id, at_ms, audit_id)",
)


def upgrade() -> None:
    """Add the columns, and fill them in from the redemptions."""
    for statement in STATEMENTS:
        op.execute(statement)
