"""Migrations that tests make up."""

from collections.abc import Callable

from alembic import op


def upgrade_of(*steps: str | Callable[[], None]) -> Callable[[], None]:
    """Return a migration's function that runs SQL statements and other steps."""

    def upgrade() -> None:
        for step in steps:
            if isinstance(step, str):
                op.execute(step)
            else:
                step()

    return upgrade
