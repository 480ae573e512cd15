"""The catalogue of membership benefits."""

from alembic import op

revision = "0008"
down_revision = "0007"

STATEMENTS = (
    """
    CREATE TABLE benefits (
        benefit_id text NOT NULL,
        merchant_id text NOT NULL,
        store_ids text[] NOT NULL,
        level_code text NOT NULL,
        membership_type text NOT NULL,
        reward_scene text NOT NULL,
        reward_type text NOT NULL,
        benefits_status text NOT NULL,
        details jsonb NOT NULL,
        irrelevant_values jsonb NOT NULL,
        revision bigint NOT NULL,
        updated_at_ms bigint NOT NULL,
        CONSTRAINT pk_benefits PRIMARY KEY (benefit_id, merchant_id)
    )
    """,
    "COMMENT ON COLUMN benefits.store_ids IS 'Empty means all.'",
    "COMMENT ON COLUMN benefits.details IS 'The other fields of BenefitsInfo that are present.'",
    "COMMENT ON COLUMN benefits.irrelevant_values IS 'What no rule of BenefitsInfo lets be relevant.'",
    "CREATE INDEX ix_benefits_merchant ON benefits (merchant_id, benefit_id)",
)


def upgrade() -> None:
    """Create the table."""
    for statement in STATEMENTS:
        op.execute(statement)
