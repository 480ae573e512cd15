"""What is checked of the database before a command uses it."""

import structlog

from pointbook_server.db.database import Database
from pointbook_server.db.migrations import is_pending
from pointbook_server.db.schema import SchemaError, check_schema
from pointbook_server.errors import PointbookError

log = structlog.get_logger()


async def check_database(database_url: str) -> None:
    """Raise OSError where a database cannot be served from; log one that is away, since the server waits for it."""
    database = Database(database_url, pool_size=1)
    try:
        async with database.autocommit() as connection:
            await check_schema(connection)
    except SchemaError as error:
        raise OSError(str(error)) from error
    except PointbookError as error:
        log.error("the database is away; the server waits for it", cause=repr(error.__cause__))  # noqa: TRY400 - no stack
    finally:
        await database.dispose()


async def check_migrated(database_url: str) -> None:
    """Raise OSError where a database lacks the newest tables, and DATABASE_UNAVAILABLE where it is away."""
    if await is_pending(database_url):
        raise OSError("the database is not at the newest revision; run `pointbook migrate`")
