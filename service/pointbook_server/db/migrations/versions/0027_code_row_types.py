"""The types of the rows that codes and redemptions write.

No table changes, and reads and writes continue. A release that needs other columns creates types of its own, because
the previous release uses these until its last server has stopped.
"""

from alembic import op

revision = "0027"
down_revision = "0026"

STATEMENTS = (
    """
    CREATE TYPE validation_challenge_row AS (
        challenge_id text, customer text, program_id bigint, points bigint, group_redemption boolean, group_id text,
        channel text, destination_digest bytea, called_number text, key_id text, code_digest bytea, attempts integer,
        unnamed_attempts integer, state text, delivery text, sent_at_ms bigint, resend_at_ms bigint,
        expires_at_ms bigint, confirmed_at_ms bigint
    )
    """,
    "CREATE TYPE validation_counter_row AS (subject text, counts jsonb, revision bigint)",
    """
    CREATE TYPE validation_audit_row AS (
        audit_id text, action text, outcome text, customer text, challenge_id text, program_id bigint, points bigint,
        channel text, actor text, reason text, repeat_key text, event_count bigint
    )
    """,
    """
    CREATE TYPE redemption_row AS (
        redemption_id text, reference text, redeemer text, program_id bigint, points bigint, group_redemption boolean,
        group_id text, transaction_number text, notes text, redeem_value text, redeem_local_value text,
        points_currency_ratio text, active_points bigint, created_at_ms bigint, settle_by_ms bigint, draws jsonb,
        holds jsonb, open_points bigint, released_points bigint, reversed_points bigint, actor text
    )
    """,
)


def upgrade() -> None:
    """Create the types."""
    for statement in STATEMENTS:
        op.execute(statement)
