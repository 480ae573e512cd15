"""A settlement lead and currency decimals per program; late settlement."""

from alembic import op

revision = "0010"
down_revision = "0009"

STATEMENTS = (
    "ALTER TABLE programs ADD COLUMN local_currency_decimals integer, ADD COLUMN settlement_lead_ms bigint",
    """
    ALTER TABLE programs ADD CONSTRAINT ck_programs_local_currency_decimals
        CHECK (local_currency_decimals BETWEEN 0 AND 4)
    """,
    """
    ALTER TABLE programs ADD CONSTRAINT ck_programs_settlement_lead
        CHECK (settlement_lead_ms BETWEEN 0 AND 86400000)
    """,
    "COMMENT ON COLUMN programs.local_currency_decimals IS 'NULL for those of ISO 4217.'",
    "COMMENT ON COLUMN programs.settlement_lead_ms IS 'NULL for the default.'",
    """
    COMMENT ON COLUMN points_accounts.holds IS
    '[redemption_id, points, opened_at_ms, settle_by_ms, settlement scenes, is_released, '
    'settlement lead in ms: 5000 where it is missing]; NULL where there are none.'
    """,
    # The redemption that a decrease settles may be set after the event was received. It is never cleared, and only a
    # decrease that was not refused can have one.
    "DROP TRIGGER points_entries_no_update ON points_entries",
    """
    CREATE TRIGGER points_entries_no_update BEFORE UPDATE ON points_entries FOR EACH ROW
    WHEN (
        (OLD.event_id, OLD.merchant_id, OLD.store_id, OLD.buyer_id, OLD.update_type, OLD.scene,
         OLD.updated_value, OLD.points_balance, OLD.expires_at_ms, OLD.updated_at_ms, OLD.webhook_id,
         OLD.shop_domain, OLD.api_version, OLD.received_at_ms, OLD.outcome)
        IS DISTINCT FROM
        (NEW.event_id, NEW.merchant_id, NEW.store_id, NEW.buyer_id, NEW.update_type, NEW.scene,
         NEW.updated_value, NEW.points_balance, NEW.expires_at_ms, NEW.updated_at_ms, NEW.webhook_id,
         NEW.shop_domain, NEW.api_version, NEW.received_at_ms, NEW.outcome)
        OR (
            OLD.settled_redemption_id IS DISTINCT FROM NEW.settled_redemption_id
            AND (NEW.settled_redemption_id IS NULL OR NEW.update_type <> 'DECREASE' OR NEW.outcome = 'REFUSED')
        )
    )
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
)


def upgrade() -> None:
    """Change the tables of programs and of the ledger."""
    for statement in STATEMENTS:
        op.execute(statement)
