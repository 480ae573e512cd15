"""The migrations of the schema, and the functions that run them."""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from pointbook_server.db.database import create_engine
from pointbook_server.db.errors import database_errors

LOCK_KEY = 0x706F696E74
"""The advisory lock that serializes migrating processes."""


async def migrate(url: str) -> tuple[str | None, str | None]:
    """Migrate a database to the newest revision in one transaction.

    Returns the revisions before and after. Raises DATABASE_UNAVAILABLE.
    """
    engine = create_engine(url)
    try:
        with database_errors():
            async with engine.begin() as connection:
                return await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


async def is_pending(url: str) -> bool:
    """Return whether a database is not at the newest revision.

    Raises DATABASE_UNAVAILABLE.
    """
    engine = create_engine(url)
    try:
        with database_errors():
            async with engine.connect() as connection:
                return await connection.run_sync(_current) != _newest()
    finally:
        await engine.dispose()


@cache
def older_revisions() -> frozenset[str]:
    """Return the revisions before the newest one of this release.

    Reading the scripts takes tens of milliseconds, and each check of the database's health asks for them.
    """
    revisions = ScriptDirectory.from_config(_config()).walk_revisions()
    return frozenset(script.revision for script in revisions) - {_newest() or ""}


def _upgrade(connection: Connection) -> tuple[str | None, str | None]:
    # No limits: a migration can take long, and waits for one that another process runs.
    connection.execute(text("SET LOCAL lock_timeout = 0"))
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
    before = _current(connection)
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return before, _current(connection)


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _newest() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config
