"""The oldest revision whose release can use the schema.

Servers of the previous release do not read the column.
"""

from alembic import op

revision = "0029"
down_revision = "0028"


def upgrade() -> None:
    """Add the column to the table with the revision."""
    op.execute("ALTER TABLE alembic_version ADD COLUMN compatible_from text")
    op.execute(
        "COMMENT ON COLUMN alembic_version.compatible_from IS 'The oldest revision whose release can use the schema; "
        "NULL if all can.'"
    )
