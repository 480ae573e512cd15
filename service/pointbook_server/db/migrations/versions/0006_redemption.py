"""Redemptions, their holds on accounts, and reversals."""

from alembic import op

revision = "0006"
down_revision = "0005"

STATEMENTS = (
    "ALTER TABLE points_accounts ADD COLUMN holds jsonb",
    """
    COMMENT ON COLUMN points_accounts.holds IS
    '[redemption_id, points, opened_at_ms, settle_by_ms, settlement scenes, is_released]; NULL where there are none.'
    """,
    "ALTER TABLE points_entries ADD COLUMN settled_redemption_id text",
    "COMMENT ON COLUMN points_entries.settled_redemption_id IS 'The redemption whose hold the entry settled.'",
    "DROP TRIGGER points_entries_no_update ON points_entries",
    """
    CREATE TRIGGER points_entries_no_update BEFORE UPDATE ON points_entries FOR EACH ROW
    WHEN (
        (OLD.event_id, OLD.merchant_id, OLD.store_id, OLD.buyer_id, OLD.update_type, OLD.scene,
         OLD.updated_value, OLD.points_balance, OLD.expires_at_ms, OLD.updated_at_ms, OLD.webhook_id,
         OLD.shop_domain, OLD.api_version, OLD.received_at_ms, OLD.outcome, OLD.settled_redemption_id)
        IS DISTINCT FROM
        (NEW.event_id, NEW.merchant_id, NEW.store_id, NEW.buyer_id, NEW.update_type, NEW.scene,
         NEW.updated_value, NEW.points_balance, NEW.expires_at_ms, NEW.updated_at_ms, NEW.webhook_id,
         NEW.shop_domain, NEW.api_version, NEW.received_at_ms, NEW.outcome, NEW.settled_redemption_id)
    )
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
    "ALTER TABLE validation_challenges DROP CONSTRAINT ck_validation_challenges_state",
    """
    ALTER TABLE validation_challenges
        ADD CONSTRAINT ck_validation_challenges_state CHECK (state IN ('LIVE', 'REPLACED', 'USED'))
    """,
    """
    CREATE TABLE redemptions (
        redemption_id text NOT NULL,
        merchant_id text NOT NULL,
        reference text NOT NULL,
        redeemer text NOT NULL,
        program_id bigint NOT NULL,
        points bigint NOT NULL,
        group_redemption boolean NOT NULL,
        group_id text NOT NULL,
        transaction_number text NOT NULL,
        notes text NOT NULL,
        redeem_value text NOT NULL,
        redeem_local_value text NOT NULL,
        points_currency_ratio text NOT NULL,
        active_points bigint NOT NULL,
        created_at_ms bigint NOT NULL,
        settle_by_ms bigint NOT NULL,
        draws jsonb NOT NULL,
        holds jsonb NOT NULL,
        open_points bigint NOT NULL,
        released_points bigint NOT NULL,
        reversed_points bigint NOT NULL,
        CONSTRAINT pk_redemptions PRIMARY KEY (redemption_id, merchant_id),
        CONSTRAINT uq_redemptions_reference UNIQUE (reference, merchant_id),
        CONSTRAINT ck_redemptions_points CHECK (points > 0),
        CONSTRAINT ck_redemptions_reversed_points CHECK (reversed_points BETWEEN 0 AND points),
        CONSTRAINT ck_redemptions_held_points CHECK (
            open_points >= 0 AND released_points >= 0 AND open_points + released_points + reversed_points <= points
        )
    )
    """,
    """
    COMMENT ON COLUMN redemptions.redeemer IS
    'customer ID, or buyer STORE_ID BUYER_ID where nobody has registered the buyer.'
    """,
    """
    COMMENT ON COLUMN redemptions.draws IS
    '[store_id, buyer_id, points, expires_at_ms or null, event_id of the lot, reversed points], in their order.'
    """,
    "COMMENT ON COLUMN redemptions.holds IS '[store_id, buyer_id, points, OPEN or SETTLED or RELEASED].'",
    "CREATE INDEX ix_redemptions_redeemer ON redemptions (redeemer, merchant_id, created_at_ms)",
    "CREATE INDEX ix_redemptions_created ON redemptions (merchant_id, created_at_ms, redemption_id) WHERE points > 0",
    "CREATE INDEX ix_redemptions_open ON redemptions (settle_by_ms, merchant_id) WHERE open_points > 0",
    """
    CREATE TABLE redemption_reversals (
        reference text NOT NULL,
        merchant_id text NOT NULL,
        redemption_id text NOT NULL,
        points bigint NOT NULL,
        notes text NOT NULL,
        created_at_ms bigint NOT NULL,
        CONSTRAINT pk_redemption_reversals PRIMARY KEY (reference, merchant_id)
    )
    """,
    "COMMENT ON COLUMN redemption_reversals.points IS 'What was asked for: 0 is all that was left.'",
    """
    CREATE TABLE redemption_audit (
        audit_id text NOT NULL,
        merchant_id text NOT NULL,
        redemption_id text NOT NULL,
        action text NOT NULL,
        reason text NOT NULL,
        at_ms bigint NOT NULL,
        CONSTRAINT pk_redemption_audit PRIMARY KEY (redemption_id, merchant_id, audit_id),
        CONSTRAINT ck_redemption_audit_action CHECK (action IN ('SETTLE', 'RELEASE'))
    )
    """,
)


def upgrade() -> None:
    """Create the tables."""
    for statement in STATEMENTS:
        op.execute(statement)
