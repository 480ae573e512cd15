"""The first tables: stores, tokens, accounts, entries, programs and challenges.

A migration must not change later: it spells out its tables and imports no code of this project that may change.
"""

from alembic import op

revision = "0001"
down_revision = None

STATEMENTS = (
    """
    CREATE TABLE stores (
        store_id text NOT NULL,
        merchant_id text NOT NULL,
        shop_domain text NOT NULL,
        display_name text NOT NULL,
        revision bigint NOT NULL,
        updated_at_ms bigint NOT NULL,
        CONSTRAINT pk_stores PRIMARY KEY (store_id),
        CONSTRAINT uq_stores_merchant_id_store_id UNIQUE (merchant_id, store_id)
    )
    """,
    """
    CREATE TABLE api_tokens (
        token_id text NOT NULL,
        secret_hash bytea NOT NULL,
        name text NOT NULL,
        merchants text[] NOT NULL,
        scopes text[] NOT NULL,
        created_at_ms bigint NOT NULL,
        expires_at_ms bigint,
        revoked_at_ms bigint,
        CONSTRAINT pk_api_tokens PRIMARY KEY (token_id),
        CONSTRAINT ck_api_tokens_secret_hash CHECK (octet_length(secret_hash) = 32)
    )
    """,
    """
    CREATE TABLE points_accounts (
        merchant_id text NOT NULL,
        store_id text NOT NULL,
        buyer_id text NOT NULL,
        opening bigint NOT NULL DEFAULT 0,
        balance bigint NOT NULL DEFAULT 0,
        drift bigint NOT NULL DEFAULT 0,
        silently_expired bigint NOT NULL DEFAULT 0,
        lifetime_points bigint NOT NULL DEFAULT 0,
        newest_at_ms bigint,
        lots jsonb NOT NULL DEFAULT '[]'::jsonb,
        CONSTRAINT pk_points_accounts PRIMARY KEY (buyer_id, store_id, merchant_id),
        CONSTRAINT fk_points_accounts_stores FOREIGN KEY (merchant_id, store_id)
            REFERENCES stores (merchant_id, store_id),
        CONSTRAINT ck_points_accounts_silently_expired CHECK (silently_expired >= 0),
        CONSTRAINT ck_points_accounts_lifetime_points CHECK (lifetime_points >= 0)
    ) WITH (fillfactor = 70)
    """,
    """
    COMMENT ON COLUMN points_accounts.newest_at_ms IS
    'When the newest entry happened; NULL while no event opened it.'
    """,
    """
    COMMENT ON COLUMN points_accounts.lots IS
    '[remaining, original, expires_at_ms or null, event_id], in the order of the fold.'
    """,
    """
    CREATE TABLE points_entries (
        event_id text NOT NULL,
        merchant_id text NOT NULL,
        store_id text NOT NULL,
        buyer_id text NOT NULL,
        update_type text NOT NULL,
        scene text NOT NULL,
        updated_value bigint NOT NULL,
        points_balance bigint,
        expires_at_ms bigint,
        updated_at_ms bigint NOT NULL,
        webhook_id text NOT NULL,
        shop_domain text NOT NULL,
        api_version text NOT NULL,
        received_at_ms bigint NOT NULL,
        outcome text NOT NULL,
        ordinal integer NOT NULL,
        balance_before bigint NOT NULL,
        balance_after bigint NOT NULL,
        drift bigint NOT NULL,
        silently_expired bigint NOT NULL,
        draws jsonb NOT NULL,
        CONSTRAINT pk_points_entries PRIMARY KEY (event_id, merchant_id),
        CONSTRAINT ck_points_entries_update_type CHECK (update_type IN ('INCREASE', 'DECREASE')),
        CONSTRAINT ck_points_entries_updated_value CHECK (updated_value >= 0),
        CONSTRAINT ck_points_entries_outcome CHECK (outcome IN ('APPLIED', 'LATE', 'REFUSED'))
    )
    """,
    "COMMENT ON COLUMN points_entries.outcome IS 'REFUSED remembers a verdict; such a row is no entry of the book.'",
    "COMMENT ON COLUMN points_entries.ordinal IS 'The place inside the millisecond, from 0.'",
    "COMMENT ON COLUMN points_entries.draws IS '[points, expires_at_ms or null, event_id of the lot].'",
    "CREATE INDEX ix_points_entries_account ON points_entries (buyer_id, store_id, merchant_id, updated_at_ms)",
    # The event and how it was received are immutable; columns derived by the fold may be rewritten.
    """
    CREATE FUNCTION points_entries_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'entries of the book are never changed or deleted'
            USING ERRCODE = 'restrict_violation', TABLE = 'points_entries',
                CONSTRAINT = 'points_entries_unchangeable';
    END
    $$
    """,
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
    )
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
    """
    CREATE TRIGGER points_entries_no_delete BEFORE DELETE ON points_entries FOR EACH ROW
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
    """
    CREATE TRIGGER points_entries_no_truncate BEFORE TRUNCATE ON points_entries FOR EACH STATEMENT
    EXECUTE FUNCTION points_entries_refuse_change()
    """,
    """
    CREATE TABLE programs (
        merchant_id text NOT NULL,
        program_id bigint NOT NULL,
        display_name text NOT NULL,
        store_ids text[] NOT NULL,
        redemption_enabled boolean NOT NULL,
        time_zone text NOT NULL,
        default_region text NOT NULL,
        allowed_regions text[] NOT NULL,
        criteria jsonb NOT NULL,
        point_value numeric,
        currency_code text NOT NULL,
        local_currency_code text NOT NULL,
        local_currency_rate numeric,
        allow_group_redemption boolean NOT NULL,
        allow_cross_program_redemption boolean NOT NULL,
        settlement_window_ms bigint NOT NULL,
        settlement_scenes text[] NOT NULL,
        validation jsonb NOT NULL,
        revision bigint NOT NULL,
        updated_at_ms bigint NOT NULL,
        CONSTRAINT pk_programs PRIMARY KEY (merchant_id, program_id),
        CONSTRAINT ck_programs_program_id CHECK (program_id >= 1),
        CONSTRAINT ck_programs_point_value CHECK (point_value > 0),
        CONSTRAINT ck_programs_local_currency_rate CHECK (local_currency_rate > 0)
    )
    """,
    "COMMENT ON COLUMN programs.criteria IS 'The criteria that limit, by their names.'",
    "COMMENT ON COLUMN programs.validation IS 'The validation settings, by their names.'",
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
        destination text NOT NULL,
        key_id text NOT NULL,
        code_digest bytea NOT NULL,
        attempts integer NOT NULL DEFAULT 0,
        unnamed_attempts integer NOT NULL DEFAULT 0,
        state text NOT NULL,
        delivery text NOT NULL,
        sent_at_ms bigint NOT NULL,
        resend_at_ms bigint NOT NULL,
        expires_at_ms bigint NOT NULL,
        CONSTRAINT pk_validation_challenges PRIMARY KEY (challenge_id, merchant_id),
        CONSTRAINT ck_validation_challenges_code_digest CHECK (octet_length(code_digest) = 32),
        CONSTRAINT ck_validation_challenges_attempts CHECK (attempts BETWEEN 0 AND 5),
        CONSTRAINT ck_validation_challenges_unnamed_attempts CHECK (unnamed_attempts BETWEEN 0 AND 5),
        CONSTRAINT ck_validation_challenges_state CHECK (state IN ('LIVE', 'REPLACED')),
        CONSTRAINT ck_validation_challenges_delivery
            CHECK (delivery IN ('PENDING', 'SENT', 'FAILED', 'UNCERTAIN'))
    )
    """,
    """
    COMMENT ON COLUMN validation_challenges.unnamed_attempts IS
    'Those of guesses that name no challenge_id, which must not lock out the ones that do.'
    """,
    "COMMENT ON COLUMN validation_challenges.customer IS 'Who must type the code: the resolved customer.'",
    """
    CREATE UNIQUE INDEX uq_validation_challenges_live ON validation_challenges (customer, merchant_id)
    WHERE state = 'LIVE'
    """,
)


def upgrade() -> None:
    """Create the tables."""
    for statement in STATEMENTS:
        op.execute(statement)
