"""Customers, their identifiers, their webhooks, and user groups."""

from alembic import op

revision = "0005"
down_revision = "0004"

STATEMENTS = (
    """
    CREATE TABLE customers (
        customer_id text NOT NULL,
        merchant_id text NOT NULL,
        language text NOT NULL,
        fraud_blocked boolean NOT NULL,
        revision bigint NOT NULL,
        created_at_ms bigint NOT NULL,
        updated_at_ms bigint NOT NULL,
        CONSTRAINT pk_customers PRIMARY KEY (customer_id, merchant_id)
    )
    """,
    """
    CREATE TABLE customer_identifiers (
        value text NOT NULL,
        kind text NOT NULL,
        source text NOT NULL,
        account_id text NOT NULL,
        merchant_id text NOT NULL,
        customer_id text NOT NULL,
        CONSTRAINT pk_customer_identifiers PRIMARY KEY (value, kind, source, account_id, merchant_id),
        CONSTRAINT fk_customer_identifiers_customers
            FOREIGN KEY (customer_id, merchant_id) REFERENCES customers (customer_id, merchant_id)
    )
    """,
    "COMMENT ON COLUMN customer_identifiers.source IS 'Who knows it; empty for the customer''s own.'",
    "CREATE INDEX ix_customer_identifiers_customer ON customer_identifiers (customer_id, merchant_id)",
    """
    CREATE TABLE customer_buyers (
        buyer_id text NOT NULL,
        store_id text NOT NULL,
        merchant_id text NOT NULL,
        customer_id text,
        mobile_as_of text,
        email_as_of text,
        CONSTRAINT pk_customer_buyers PRIMARY KEY (buyer_id, store_id, merchant_id),
        CONSTRAINT fk_customer_buyers_customers
            FOREIGN KEY (customer_id, merchant_id) REFERENCES customers (customer_id, merchant_id)
    )
    """,
    """
    COMMENT ON COLUMN customer_buyers.customer_id IS
    'NULL where nobody owns the buyer, of whom a webhook has told.'
    """,
    "COMMENT ON COLUMN customer_buyers.mobile_as_of IS 'The newest update that told the mobile number.'",
    "COMMENT ON COLUMN customer_buyers.email_as_of IS 'The newest update that told the e-mail address.'",
    "CREATE INDEX ix_customer_buyers_customer ON customer_buyers (customer_id, merchant_id)",
    """
    CREATE TABLE customer_updates (
        event_id text NOT NULL,
        merchant_id text NOT NULL,
        store_id text NOT NULL,
        buyer_id text NOT NULL,
        content_digest bytea NOT NULL,
        updated_at_ms bigint NOT NULL,
        CONSTRAINT pk_customer_updates PRIMARY KEY (event_id, merchant_id),
        CONSTRAINT ck_customer_updates_content_digest CHECK (octet_length(content_digest) = 32)
    )
    """,
    "CREATE INDEX ix_customer_updates_buyer ON customer_updates (buyer_id, store_id, merchant_id)",
    """
    CREATE TABLE customer_tombstones (
        digest bytea NOT NULL,
        merchant_id text NOT NULL,
        redacted_at_ms bigint NOT NULL,
        CONSTRAINT pk_customer_tombstones PRIMARY KEY (digest, merchant_id),
        CONSTRAINT ck_customer_tombstones_digest CHECK (octet_length(digest) = 32)
    )
    """,
    "COMMENT ON COLUMN customer_tombstones.digest IS 'Of the buyer, under a code key.'",
    """
    CREATE TABLE customer_audit (
        audit_id text NOT NULL,
        merchant_id text NOT NULL,
        customer_id text NOT NULL,
        action text NOT NULL,
        kind text,
        store_id text,
        buyer_id text,
        to_customer_id text,
        reason text NOT NULL,
        at_ms bigint NOT NULL,
        CONSTRAINT pk_customer_audit PRIMARY KEY (customer_id, merchant_id, audit_id),
        CONSTRAINT ck_customer_audit_action CHECK (action IN ('MOVE', 'REDACT'))
    )
    """,
    """
    COMMENT ON COLUMN customer_audit.kind IS
    'What was moved, without its value; a buyer''s stands beside it.'
    """,
    """
    CREATE TRIGGER customer_audit_no_change BEFORE UPDATE OR DELETE ON customer_audit FOR EACH ROW
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
    """
    CREATE TRIGGER customer_audit_no_truncate BEFORE TRUNCATE ON customer_audit FOR EACH STATEMENT
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
    """
    CREATE TABLE user_groups (
        group_id text NOT NULL,
        merchant_id text NOT NULL,
        external_id text,
        primary_customer_id text NOT NULL,
        revision bigint NOT NULL,
        updated_at_ms bigint NOT NULL,
        CONSTRAINT pk_user_groups PRIMARY KEY (group_id, merchant_id),
        CONSTRAINT uq_user_groups_external_id UNIQUE (external_id, merchant_id),
        CONSTRAINT uq_user_groups_primary_customer_id UNIQUE (primary_customer_id, merchant_id),
        CONSTRAINT fk_user_groups_customers
            FOREIGN KEY (primary_customer_id, merchant_id) REFERENCES customers (customer_id, merchant_id)
    )
    """,
    """
    CREATE TABLE user_group_members (
        customer_id text NOT NULL,
        group_id text NOT NULL,
        merchant_id text NOT NULL,
        can_redeem boolean NOT NULL,
        blocked boolean NOT NULL,
        is_default boolean NOT NULL,
        CONSTRAINT pk_user_group_members PRIMARY KEY (customer_id, group_id, merchant_id),
        CONSTRAINT fk_user_group_members_customers
            FOREIGN KEY (customer_id, merchant_id) REFERENCES customers (customer_id, merchant_id),
        CONSTRAINT fk_user_group_members_user_groups
            FOREIGN KEY (group_id, merchant_id) REFERENCES user_groups (group_id, merchant_id) ON DELETE CASCADE
    )
    """,
    "CREATE INDEX ix_user_group_members_group ON user_group_members (group_id, merchant_id)",
    """
    CREATE UNIQUE INDEX uq_user_group_members_default ON user_group_members (customer_id, merchant_id)
    WHERE is_default
    """,
    "ALTER TABLE quarantined_webhooks ADD COLUMN subject_digest bytea",
    """
    COMMENT ON COLUMN quarantined_webhooks.subject_digest IS
    'Of the customer whom the body tells of, by which it is found to be erased; NULL for none.'
    """,
    """
    CREATE INDEX ix_quarantined_webhooks_subject ON quarantined_webhooks (subject_digest, merchant_id)
    WHERE subject_digest IS NOT NULL
    """,
)


def upgrade() -> None:
    """Create the tables, and index quarantined webhooks by customer."""
    for statement in STATEMENTS:
        op.execute(statement)
