"""Requests to erase stores, and indexes for the personal data of their customers."""

from alembic import op

revision = "0012"
down_revision = "0011"

STATEMENTS = (
    """
    CREATE TABLE store_erasures (
        event_id text NOT NULL,
        merchant_id text NOT NULL,
        store_id text NOT NULL,
        requested_at_ms bigint NOT NULL,
        due_at_ms bigint NOT NULL,
        begun_at_ms bigint,
        erased_to text NOT NULL,
        closed_at_ms bigint,
        reason text NOT NULL,
        CONSTRAINT pk_store_erasures PRIMARY KEY (event_id, merchant_id),
        CONSTRAINT fk_store_erasures_stores
            FOREIGN KEY (merchant_id, store_id) REFERENCES stores (merchant_id, store_id)
    )
    """,
    """
    COMMENT ON COLUMN store_erasures.begun_at_ms IS
    'Older customer webhooks of the store are ignored; NULL until it begins.'
    """,
    "COMMENT ON COLUMN store_erasures.erased_to IS 'The last buyer that was erased, in their order.'",
    """
    COMMENT ON COLUMN store_erasures.closed_at_ms IS
    'When nothing was left to erase; NULL while the request is open.'
    """,
    "CREATE INDEX ix_store_erasures_store ON store_erasures (store_id, merchant_id)",
    "CREATE INDEX ix_store_erasures_merchant ON store_erasures (merchant_id, event_id)",
    """
    CREATE UNIQUE INDEX uq_store_erasures_open ON store_erasures (store_id, merchant_id)
    WHERE closed_at_ms IS NULL
    """,
    "CREATE INDEX ix_customer_buyers_store ON customer_buyers (store_id, merchant_id, buyer_id)",
    "ALTER TABLE customer_audit DROP CONSTRAINT ck_customer_audit_action",
    """
    ALTER TABLE customer_audit ADD CONSTRAINT ck_customer_audit_action
    CHECK (action IN ('MOVE', 'REDACT', 'ERASE_STORE'))
    """,
    "ALTER TABLE quarantined_webhooks ADD COLUMN store_digest bytea",
    """
    COMMENT ON COLUMN quarantined_webhooks.store_digest IS
    'Of the store of a customer''s webhook, likewise.'
    """,
    """
    CREATE INDEX ix_quarantined_webhooks_store ON quarantined_webhooks (store_digest, merchant_id, quarantine_id)
    WHERE store_digest IS NOT NULL AND body IS NOT NULL
    """,
)


def upgrade() -> None:
    """Create the table, and index a store's customers and their webhooks."""
    for statement in STATEMENTS:
        op.execute(statement)
