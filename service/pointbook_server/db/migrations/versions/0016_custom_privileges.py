"""Custom privileges: a shop's own texts about its membership levels."""

from alembic import op

revision = "0016"
down_revision = "0015"

STATEMENTS = (
    """
    CREATE TABLE custom_privileges (
        privilege_id text NOT NULL,
        merchant_id text NOT NULL,
        level_code text NOT NULL,
        privilege_name text,
        privilege_description text,
        benefits_icon text,
        previlege_status text,
        revision bigint NOT NULL,
        updated_at_ms bigint NOT NULL,
        CONSTRAINT pk_custom_privileges PRIMARY KEY (privilege_id, merchant_id)
    )
    """,
    "COMMENT ON COLUMN custom_privileges.previlege_status IS 'The spelling is SHOPLINE''s.'",
    "CREATE INDEX ix_custom_privileges_merchant ON custom_privileges (merchant_id, privilege_id)",
)


def upgrade() -> None:
    """Create the table."""
    for statement in STATEMENTS:
        op.execute(statement)
