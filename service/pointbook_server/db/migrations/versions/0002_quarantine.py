"""The quarantine of webhooks, and its usage per merchant.

A migration must not change later: it spells out its tables and imports no code of this project that may change.
"""

from alembic import op

revision = "0002"
down_revision = "0001"

STATEMENTS = (
    """
    CREATE TABLE quarantined_webhooks (
        quarantine_id text NOT NULL,
        merchant_id text NOT NULL,
        reason text NOT NULL,
        body_digest bytea NOT NULL,
        detail text NOT NULL,
        topic text NOT NULL,
        key_id text,
        headers bytea NOT NULL,
        body bytea,
        body_size integer NOT NULL,
        kept_bytes bigint NOT NULL,
        received_at_ms bigint NOT NULL,
        last_received_at_ms bigint NOT NULL,
        receive_count bigint NOT NULL,
        state text NOT NULL,
        replay_event_id text,
        replays_running bigint NOT NULL,
        replay_until_ms bigint NOT NULL,
        replayed_at_ms bigint,
        CONSTRAINT pk_quarantined_webhooks PRIMARY KEY (quarantine_id, merchant_id),
        CONSTRAINT uq_quarantined_webhooks_body UNIQUE (body_digest, reason, merchant_id),
        CONSTRAINT ck_quarantined_webhooks_body_digest CHECK (octet_length(body_digest) = 32),
        CONSTRAINT ck_quarantined_webhooks_state CHECK (state IN ('QUARANTINED', 'REPLAYED')),
        CONSTRAINT ck_quarantined_webhooks_replayed
            CHECK (state <> 'REPLAYED' OR (replay_event_id IS NOT NULL AND replayed_at_ms IS NOT NULL))
    )
    """,
    "COMMENT ON COLUMN quarantined_webhooks.body_digest IS 'Keyed for customer topics.'",
    """
    COMMENT ON COLUMN quarantined_webhooks.key_id IS
    'The key that encrypts headers and body; NULL where they stand in clear.'
    """,
    "COMMENT ON COLUMN quarantined_webhooks.headers IS '[name, value] in their order, as JSON.'",
    "COMMENT ON COLUMN quarantined_webhooks.body IS 'NULL when it was erased with its customer.'",
    "COMMENT ON COLUMN quarantined_webhooks.kept_bytes IS 'What it counts for in quarantine_usage.'",
    """
    COMMENT ON COLUMN quarantined_webhooks.replay_event_id IS
    'The event that it is, or was, replayed as: set before it is applied.'
    """,
    "COMMENT ON COLUMN quarantined_webhooks.replays_running IS 'How many may be running until replay_until_ms.'",
    """
    CREATE INDEX ix_quarantined_webhooks_received
    ON quarantined_webhooks (received_at_ms, quarantine_id, merchant_id)
    """,
    """
    CREATE TABLE quarantine_usage (
        merchant_id text NOT NULL,
        webhooks bigint NOT NULL,
        bytes bigint NOT NULL,
        CONSTRAINT pk_quarantine_usage PRIMARY KEY (merchant_id),
        CONSTRAINT ck_quarantine_usage_webhooks CHECK (webhooks >= 0),
        CONSTRAINT ck_quarantine_usage_bytes CHECK (bytes >= 0)
    )
    """,
)


def upgrade() -> None:
    """Create the tables."""
    for statement in STATEMENTS:
        op.execute(statement)
