"""Checks of the database before a command uses it."""

import structlog

from pointbook_server.db.database import Database
from pointbook_server.db.migrations import read_stored_revision
from pointbook_server.db.migrations.revisions import all_revisions, find_problem
from pointbook_server.db.schema import SchemaError, check_schema
from pointbook_server.errors import PointbookError

log = structlog.get_logger()


async def check_database(database_url: str) -> None:
    """Check a database before serving.

    An unavailable one is logged, since the server waits for it. Raises OSError if its schema or its settings are wrong.
    """
    database = Database(database_url, pool_size=1)
    try:
        async with database.autocommit() as connection:
            await check_schema(connection)
    except SchemaError as error:
        raise OSError(str(error)) from error
    except PointbookError as error:
        log.error("the database is unavailable, waiting for it", cause=repr(error.__cause__))  # noqa: TRY400 - no stack trace
    finally:
        await database.dispose()


async def check_migrated(database_url: str) -> None:
    """Raise OSError if this release cannot use a database's revision.

    Raises DATABASE_UNAVAILABLE.
    """
    if problem := find_problem(await read_stored_revision(database_url), all_revisions()):
        raise OSError(problem)
