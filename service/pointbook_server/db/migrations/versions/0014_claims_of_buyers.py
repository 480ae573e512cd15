"""An index of claims by buyer, for redactions."""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Create the index."""
    op.execute("CREATE INDEX ix_customer_claims_buyer ON customer_claims (buyer_id, merchant_id)")
