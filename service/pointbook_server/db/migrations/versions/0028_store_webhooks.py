"""When a webhook of each store was last accepted.

The column is new and nullable, so adding it takes a moment, and the previous release ignores it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"

COMMENT = "When a webhook of the store was last accepted, written in rounds of about a minute; NULL: never."


def upgrade() -> None:
    """Add the column."""
    op.add_column("stores", sa.Column("last_webhook_at_ms", sa.BigInteger, comment=COMMENT))
