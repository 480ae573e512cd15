"""The index behind ListExpiringPoints."""

from alembic import op

revision = "0011"
down_revision = "0010"

STATEMENT = """
    CREATE INDEX ix_points_entries_expiry ON points_entries (store_id, merchant_id, expires_at_ms, buyer_id)
    WHERE expires_at_ms IS NOT NULL
"""


def upgrade() -> None:
    """Create the index."""
    op.execute(STATEMENT)
