"""Lots in drawing order, checkpoints to fold from, and voided entries."""

from alembic import op

revision = "0003"
down_revision = "0002"

STATEMENTS = (
    """
    ALTER TABLE points_accounts
        ALTER COLUMN opening DROP NOT NULL,
        ALTER COLUMN opening DROP DEFAULT,
        ADD COLUMN far_lots jsonb,
        ADD COLUMN drawn_to_ms bigint NOT NULL DEFAULT 0,
        ADD COLUMN uncheckpointed integer NOT NULL DEFAULT 0
    """,
    # Earlier releases did not record the latest expiry drawn from, so assume the maximum.
    """
    UPDATE points_accounts AS account SET
        opening = CASE WHEN newest_at_ms IS NOT NULL THEN opening END,
        drawn_to_ms = CASE WHEN newest_at_ms IS NOT NULL THEN 9223372036854775807 ELSE 0 END,
        lots = (
            SELECT coalesce(jsonb_agg(lot ORDER BY coalesce((lot->>2)::bigint, 9223372036854775807), place), '[]')
            FROM jsonb_array_elements(account.lots) WITH ORDINALITY AS lots (lot, place)
        )
    """,
    "COMMENT ON COLUMN points_accounts.opening IS 'The balance before the first entry; NULL while none counts.'",
    "COMMENT ON COLUMN points_accounts.newest_at_ms IS 'When the newest entry happened; NULL while there is none.'",
    """
    COMMENT ON COLUMN points_accounts.lots IS
    '[remaining, original, expires_at_ms or null, event_id], in the order in which they are drawn: the first of them.'
    """,
    """
    COMMENT ON COLUMN points_accounts.far_lots IS
    '[points, expires_at_ms or null, event_id]: what lies beyond, and the first of it; NULL where lots has all.'
    """,
    "COMMENT ON COLUMN points_accounts.drawn_to_ms IS 'The latest expiry that was ever drawn from.'",
    "COMMENT ON COLUMN points_accounts.uncheckpointed IS 'How many entries there are since the last checkpoint.'",
    """
    CREATE INDEX ix_points_accounts_drifting ON points_accounts (merchant_id, store_id, buyer_id) WHERE drift <> 0
    """,
    """
    CREATE TABLE points_checkpoints (
        merchant_id text NOT NULL,
        store_id text NOT NULL,
        buyer_id text NOT NULL,
        newest_at_ms bigint NOT NULL,
        opening bigint,
        balance bigint NOT NULL,
        drift bigint NOT NULL,
        silently_expired bigint NOT NULL,
        lifetime_points bigint NOT NULL,
        lots jsonb NOT NULL,
        far_lots jsonb,
        drawn_to_ms bigint NOT NULL,
        CONSTRAINT pk_points_checkpoints PRIMARY KEY (buyer_id, store_id, merchant_id, newest_at_ms)
    )
    """,
    """
    ALTER TABLE points_entries
        ADD COLUMN voided_at_ms bigint,
        ADD COLUMN void_reason text
    """,
    "COMMENT ON COLUMN points_entries.voided_at_ms IS 'Since when the entry counts for nothing; NULL where it counts.'",
    """
    CREATE TABLE points_voidings (
        voiding_id text NOT NULL,
        merchant_id text NOT NULL,
        event_id text NOT NULL,
        action text NOT NULL,
        reason text NOT NULL,
        at_ms bigint NOT NULL,
        CONSTRAINT pk_points_voidings PRIMARY KEY (event_id, merchant_id, voiding_id),
        CONSTRAINT ck_points_voidings_action CHECK (action IN ('VOID', 'UNVOID'))
    )
    """,
    """
    CREATE TRIGGER points_voidings_no_change BEFORE UPDATE OR DELETE ON points_voidings FOR EACH ROW
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
    """
    CREATE TRIGGER points_voidings_no_truncate BEFORE TRUNCATE ON points_voidings FOR EACH STATEMENT
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
)


def upgrade() -> None:
    """Change the ledger's tables."""
    for statement in STATEMENTS:
        op.execute(statement)
