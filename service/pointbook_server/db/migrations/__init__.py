"""The migrations of the schema, and the functions that run them."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from pointbook_server.db import citus
from pointbook_server.db.database import create_engine
from pointbook_server.db.errors import database_errors

LOCK_KEY = 0x706F696E74
"""The advisory lock that serializes migrating processes."""

T = TypeVar("T")


async def migrate(url: str, *, on_citus: bool = False) -> tuple[str | None, str | None]:
    """Migrate a database to the newest revision in one transaction.

    Returns the revisions before and after. Raises DATABASE_UNAVAILABLE, and CitusError if the tables are distributed
    but not `on_citus`: new tables would stay on one node.
    """
    return await _run(url, partial(_upgrade, on_citus=on_citus))


async def check_cluster(url: str) -> None:
    """Raise CitusError if the tables cannot be distributed.

    Raises DATABASE_UNAVAILABLE.
    """
    await _run(url, citus.check_cluster)


async def distribute(url: str) -> list[str]:
    """Distribute the tables that are still local, and return their names.

    All in one transaction, with the types of rows. The database is at the newest revision. Raises CitusError and
    DATABASE_UNAVAILABLE.
    """
    return await _run(url, _distribute)


async def is_pending(url: str) -> bool:
    """Return whether a database is not at the newest revision.

    Raises DATABASE_UNAVAILABLE.
    """
    return await _run(url, _current) != _newest()


async def _run(url: str, work: Callable[[Connection], T]) -> T:
    """Run a function in one transaction on a connection of its own."""
    engine = create_engine(url)
    try:
        with database_errors():
            async with engine.begin() as connection:
                return await connection.run_sync(work)
    finally:
        await engine.dispose()


@cache
def older_revisions() -> frozenset[str]:
    """Return the revisions before the newest one of this release.

    Reading the scripts takes tens of milliseconds, and each check of the database's health asks for them.
    """
    revisions = ScriptDirectory.from_config(_config()).walk_revisions()
    return frozenset(script.revision for script in revisions) - {_newest() or ""}


def _upgrade(connection: Connection, *, on_citus: bool) -> tuple[str | None, str | None]:
    _wait_for_others(connection)
    if citus.is_distributed(connection):
        if not on_citus:
            raise citus.CitusError("the tables are distributed by Citus: run `pointbook migrate --citus`")
        citus.prepare_transaction(connection)
    before = _current(connection)
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return before, _current(connection)


def _distribute(connection: Connection) -> list[str]:
    _wait_for_others(connection)
    names = citus.distribute_tables(connection)
    citus.distribute_row_types(connection)
    citus.configure_workers(connection)
    return names


def _wait_for_others(connection: Connection) -> None:
    """Wait for other migrating processes, without a limit: a migration can take long."""
    connection.execute(text("SET LOCAL lock_timeout = 0"))
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _newest() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config
