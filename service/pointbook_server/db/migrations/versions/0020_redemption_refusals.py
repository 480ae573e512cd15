"""Refused redemptions, validations and codes, stored for a configured time."""

from alembic import op

revision = "0020"
down_revision = "0019"

STATEMENTS = (
    """
    CREATE TABLE redemption_refusals (
        refusal_id text NOT NULL,
        merchant_id text NOT NULL,
        customer text NOT NULL,
        at_ms bigint NOT NULL,
        method text NOT NULL,
        program_id bigint NOT NULL,
        points bigint NOT NULL,
        active_points bigint NOT NULL,
        reasons jsonb NOT NULL,
        reference text NOT NULL,
        actor text NOT NULL,
        CONSTRAINT pk_redemption_refusals PRIMARY KEY (customer, merchant_id, at_ms, refusal_id),
        CONSTRAINT ck_redemption_refusals_method CHECK (method IN ('VALIDATE', 'ISSUE', 'REDEEM'))
    )
    """,
    "COMMENT ON COLUMN redemption_refusals.customer IS 'Who wanted to redeem, as in redemptions.'",
    """
    COMMENT ON COLUMN redemption_refusals.reasons IS
    '[status code or 0, reason, message, values], in the order of the answer.'
    """,
    "COMMENT ON COLUMN redemption_refusals.reference IS 'Of RedeemPoints; empty for the other methods.'",
    "COMMENT ON COLUMN redemption_refusals.actor IS 'The id of the caller''s token; empty where there are no tokens.'",
    """
    CREATE INDEX ix_redemption_refusals_reference
    ON redemption_refusals (reference, merchant_id, at_ms, refusal_id) WHERE reference <> ''
    """,
    "CREATE INDEX ix_redemption_refusals_at ON redemption_refusals (at_ms, merchant_id) WHERE at_ms > 0",
)


def upgrade() -> None:
    """Create the table."""
    for statement in STATEMENTS:
        op.execute(statement)
