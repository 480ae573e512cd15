"""Claims: contacts that a customer gets when their current owner loses them."""

from alembic import op

revision = "0009"
down_revision = "0008"

STATEMENTS = (
    """
    CREATE TABLE customer_claims (
        customer_id text NOT NULL,
        kind text NOT NULL,
        merchant_id text NOT NULL,
        value text NOT NULL,
        store_id text NOT NULL,
        buyer_id text NOT NULL,
        at_ms bigint NOT NULL,
        rank integer NOT NULL,
        event_id text COLLATE "C" NOT NULL,
        CONSTRAINT pk_customer_claims PRIMARY KEY (customer_id, kind, merchant_id),
        CONSTRAINT fk_customer_claims_customers
            FOREIGN KEY (customer_id, merchant_id) REFERENCES customers (customer_id, merchant_id),
        CONSTRAINT ck_customer_claims_kind CHECK (kind IN ('MOBILE', 'EMAIL'))
    )
    """,
    "COMMENT ON COLUMN customer_claims.buyer_id IS 'The buyer whose webhook it was.'",
    "COMMENT ON COLUMN customer_claims.at_ms IS 'How new the webhook is: its time, kind and id.'",
    """
    CREATE INDEX ix_customer_claims_value
    ON customer_claims (value, kind, merchant_id, at_ms, rank, event_id)
    """,
)


def upgrade() -> None:
    """Create the table."""
    for statement in STATEMENTS:
        op.execute(statement)
