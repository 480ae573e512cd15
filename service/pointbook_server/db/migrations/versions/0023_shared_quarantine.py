"""A shared quarantine for webhooks whose body does not prove their merchant."""

from alembic import op

revision = "0023"
down_revision = "0022"

STATEMENTS = (
    """
    ALTER TABLE quarantined_webhooks
        ADD COLUMN claimed_merchant_id text,
        ADD COLUMN is_contested boolean NOT NULL DEFAULT false,
        ADD COLUMN signed_store_digest bytea
    """,
    """
    COMMENT ON COLUMN quarantined_webhooks.claimed_merchant_id IS
    'The merchant that the first copy''s header named; NULL in rows of a release that kept each copy by it.'
    """,
    "COMMENT ON COLUMN quarantined_webhooks.is_contested IS 'A copy named another merchant.'",
    """
    COMMENT ON COLUMN quarantined_webhooks.signed_store_digest IS
    'Of the store that the body names; NULL for none.'
    """,
    """
    CREATE UNIQUE INDEX uq_quarantined_webhooks_digest ON quarantined_webhooks (body_digest, merchant_id)
    WHERE claimed_merchant_id IS NOT NULL
    """,
    """
    CREATE INDEX ix_quarantined_webhooks_signed_store ON quarantined_webhooks (signed_store_digest, merchant_id)
    WHERE signed_store_digest IS NOT NULL
    """,
)


def upgrade() -> None:
    """Add the columns that distinguish webhooks in the shared quarantine."""
    for statement in STATEMENTS:
        op.execute(statement)
