"""The types of the rows that a batch writes.

No table changes, and reads and writes continue. A release that needs other columns creates types of its own, because
the previous release uses these until its last server has stopped.
"""

from alembic import op

revision = "0026"
down_revision = "0025"

STATE = """
    merchant_id text, store_id text, buyer_id text, opening bigint, balance bigint, drift bigint,
    silently_expired bigint, lifetime_points bigint, newest_at_ms bigint, lots jsonb, far_lots jsonb,
    drawn_to_ms bigint
"""
STATEMENTS = (
    f"CREATE TYPE points_account_row AS ({STATE}, uncheckpointed integer, holds jsonb, revision bigint)",
    f"CREATE TYPE points_checkpoint_row AS ({STATE})",
    """
    CREATE TYPE points_entry_row AS (
        merchant_id text, event_id text, store_id text, buyer_id text, update_type text, scene text,
        updated_value bigint, points_balance bigint, expires_at_ms bigint, updated_at_ms bigint, webhook_id text,
        shop_domain text, api_version text, received_at_ms bigint, outcome text, ordinal integer,
        balance_before bigint, balance_after bigint, drift bigint, silently_expired bigint, draws jsonb,
        settled_redemption_id text
    )
    """,
)


def upgrade() -> None:
    """Create the types."""
    for statement in STATEMENTS:
        op.execute(statement)
