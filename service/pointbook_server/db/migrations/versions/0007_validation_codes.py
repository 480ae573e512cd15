"""Limits, missed calls and an audit of codes; destinations stored as digests."""

from alembic import op

revision = "0007"
down_revision = "0006"

STATEMENTS = (
    "ALTER TABLE customer_identifiers ADD COLUMN since_ms bigint",
    """
    COMMENT ON COLUMN customer_identifiers.since_ms IS
    'Since when it is this customer''s; NULL where they came with it.'
    """,
    # Challenges expire within minutes, so open ones are dropped rather than converted.
    "DROP TABLE validation_challenges",
    """
    CREATE TABLE validation_challenges (
        challenge_id text NOT NULL,
        merchant_id text NOT NULL,
        customer text NOT NULL,
        program_id bigint NOT NULL,
        points bigint NOT NULL,
        group_redemption boolean NOT NULL,
        group_id text NOT NULL,
        channel text NOT NULL,
        destination_digest bytea NOT NULL,
        called_number text NOT NULL,
        key_id text NOT NULL,
        code_digest bytea NOT NULL,
        attempts integer NOT NULL,
        unnamed_attempts integer NOT NULL,
        state text NOT NULL,
        delivery text NOT NULL,
        sent_at_ms bigint NOT NULL,
        resend_at_ms bigint NOT NULL,
        expires_at_ms bigint NOT NULL,
        confirmed_at_ms bigint,
        CONSTRAINT pk_validation_challenges PRIMARY KEY (challenge_id, merchant_id),
        CONSTRAINT ck_validation_challenges_code_digest CHECK (octet_length(code_digest) = 32),
        CONSTRAINT ck_validation_challenges_destination_digest CHECK (octet_length(destination_digest) = 32),
        CONSTRAINT ck_validation_challenges_attempts CHECK (attempts BETWEEN 0 AND 5),
        CONSTRAINT ck_validation_challenges_unnamed_attempts CHECK (unnamed_attempts BETWEEN 0 AND 5),
        CONSTRAINT ck_validation_challenges_state CHECK (state IN ('LIVE', 'REPLACED', 'USED', 'ENDED')),
        CONSTRAINT ck_validation_challenges_delivery CHECK (delivery IN ('PENDING', 'SENT', 'FAILED', 'UNCERTAIN'))
    )
    """,
    "COMMENT ON COLUMN validation_challenges.customer IS 'Who must type the code: the resolved customer.'",
    """
    COMMENT ON COLUMN validation_challenges.destination_digest IS 'Keyed: where codes go is kept nowhere else.'
    """,
    "COMMENT ON COLUMN validation_challenges.called_number IS 'The number to call, for a missed call.'",
    "COMMENT ON COLUMN validation_challenges.attempts IS 'Wrong guesses that named the challenge.'",
    """
    COMMENT ON COLUMN validation_challenges.unnamed_attempts IS
    'Those that did not, which must not lock out the ones that do.'
    """,
    "COMMENT ON COLUMN validation_challenges.confirmed_at_ms IS 'When the missed call was seen.'",
    """
    CREATE UNIQUE INDEX uq_validation_challenges_live ON validation_challenges (customer, merchant_id)
    WHERE state = 'LIVE'
    """,
    """
    CREATE INDEX ix_validation_challenges_called ON validation_challenges (destination_digest, merchant_id)
    WHERE state = 'LIVE' AND channel = 'MISSED_CALL'
    """,
    """
    CREATE INDEX ix_validation_challenges_expires ON validation_challenges (expires_at_ms, merchant_id)
    WHERE points > 0
    """,
    """
    CREATE TABLE validation_tallies (
        subject text NOT NULL,
        merchant_id text NOT NULL,
        counts jsonb NOT NULL,
        revision bigint NOT NULL,
        updated_at_ms bigint NOT NULL,
        CONSTRAINT pk_validation_tallies PRIMARY KEY (subject, merchant_id)
    )
    """,
    "COMMENT ON COLUMN validation_tallies.counts IS '[at_ms, count], the oldest first.'",
    "CREATE INDEX ix_validation_tallies_updated ON validation_tallies (updated_at_ms, merchant_id) WHERE revision > 0",
    """
    CREATE TABLE missed_calls (
        call_digest text NOT NULL,
        merchant_id text NOT NULL,
        challenge_id text NOT NULL,
        at_ms bigint NOT NULL,
        CONSTRAINT pk_missed_calls PRIMARY KEY (call_digest, merchant_id)
    )
    """,
    "COMMENT ON COLUMN missed_calls.call_digest IS 'Of the provider''s id, which may be made of a number.'",
    "COMMENT ON COLUMN missed_calls.challenge_id IS 'Empty where it met none.'",
    "CREATE INDEX ix_missed_calls_at ON missed_calls (at_ms, merchant_id) WHERE at_ms > 0",
    """
    CREATE TABLE validation_audit (
        audit_id text NOT NULL,
        merchant_id text NOT NULL,
        customer text NOT NULL,
        at_ms bigint NOT NULL,
        action text NOT NULL,
        outcome text NOT NULL,
        challenge_id text NOT NULL,
        program_id bigint NOT NULL,
        points bigint NOT NULL,
        channel text NOT NULL,
        actor text NOT NULL,
        reason text NOT NULL,
        CONSTRAINT pk_validation_audit PRIMARY KEY (customer, merchant_id, audit_id),
        CONSTRAINT ck_validation_audit_action CHECK (
            action IN ('ISSUE', 'DELIVER', 'GUESS', 'USE', 'CONFIRM', 'RESET', 'END')
        )
    )
    """,
    """
    COMMENT ON COLUMN validation_audit.actor IS
    'The id of the caller''s token; empty where there are no tokens.'
    """,
)


def upgrade() -> None:
    """Create the tables."""
    for statement in STATEMENTS:
        op.execute(statement)
