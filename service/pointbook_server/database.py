"""The way to the database: one engine, transactions that are retried whole, and errors told in our words."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import asyncpg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from pointbook_server.errors import PointbookError, Reason, SettingError

TRANSACTION_ATTEMPTS_MAX = 6
RETRY_DELAY_SECONDS = 0.02
POOL_TIMEOUT_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 5.0
COMMAND_TIMEOUT_SECONDS = 20.0
RETRY_AFTER_SECONDS = 1.0
SESSION_SETTINGS = {
    "application_name": "pointbook",
    "plan_cache_mode": "force_custom_plan",
    "jit": "off",
    "lock_timeout": "5s",
    "statement_timeout": "15s",
    "idle_in_transaction_session_timeout": "30s",
}
CONFLICT_SQLSTATES = frozenset({"40001", "40P01", "55P03"})
"""Serialization failure, deadlock, lock timeout: the transaction had no effect, and may well succeed again."""
UNAVAILABLE_SQLSTATE_CLASSES = ("08", "28", "3D", "53", "57")
"""Connection errors, refused logins, no such database, lack of resources, operator intervention: it is away for us."""

T = TypeVar("T")


class RetryTransactionError(PointbookError):
    """Raised inside a transaction to roll it back and run it again, because another one came between.

    Where it is not, or too often, it is what the caller is told.
    """

    def __init__(self) -> None:
        super().__init__(
            Reason.TRANSACTION_CONFLICT,
            "Other calls kept changing the same data; retry.",
            retry_after_seconds=RETRY_AFTER_SECONDS,
        )


class Database:
    """An engine with our rules. Close it with `dispose` when no call is running any more."""

    def __init__(self, url: str, *, pool_size: int) -> None:
        self._engine = create_engine(url, pool_size=pool_size)
        self._autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        # A busy pool is no dead database, so that the pulse has a connection of its own.
        self._pulse = create_engine(url, pool_size=1)

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator[AsyncConnection]:
        """Give a connection on which every statement commits by itself: one round trip for a single statement.

        Raises TRANSACTION_CONFLICT and DATABASE_UNAVAILABLE.
        """
        with database_errors():
            async with self._autocommit.connect() as connection:
                yield connection

    async def transaction(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work` in one transaction, again as a whole where the database refused it because of others.

        Raises TRANSACTION_CONFLICT when it is refused too often, and DATABASE_UNAVAILABLE when the database is away.
        """
        for attempt in range(TRANSACTION_ATTEMPTS_MAX):
            if attempt:
                await asyncio.sleep(random.uniform(0, RETRY_DELAY_SECONDS * 2**attempt))  # noqa: S311 - only jitter
            try:
                with database_errors():
                    async with self._engine.begin() as connection:
                        return await work(connection)
            except RetryTransactionError:
                continue
        raise RetryTransactionError

    async def ping(self) -> None:
        """Ask the database for a sign of life, and for our tables. Raises whatever speaks against it."""
        async with self._pulse.connect() as connection:
            await connection.execute(text("SELECT FROM points_entries LIMIT 0"))

    async def dispose(self) -> None:
        """Close all connections."""
        await self._engine.dispose()
        await self._pulse.dispose()


def create_engine(
    url: str, *, pool_size: int, command_timeout_seconds: float | None = COMMAND_TIMEOUT_SECONDS
) -> AsyncEngine:
    """Make an engine on asyncpg whose errors never quote parameters, since they may be personal data.

    asyncpg reads the URL itself, so that it means what it means to every other PostgreSQL client, `sslmode` included.
    Custom plans are forced: a generic plan that was made while a table was empty walks all of a merchant's rows.
    """

    async def connect() -> asyncpg.Connection:
        try:
            return await asyncpg.connect(
                url,
                timeout=CONNECT_TIMEOUT_SECONDS,
                command_timeout=command_timeout_seconds,
                server_settings=SESSION_SETTINGS,
            )
        except asyncpg.ClientConfigurationError as error:
            raise SettingError(f"POINTBOOK_DATABASE_URL: {error}") from error

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        hide_parameters=True,
    )


@contextmanager
def database_errors() -> Iterator[None]:
    """Turn what the driver raises into our errors; what is a defect of ours passes through."""
    try:
        yield
    except PoolTimeoutError as error:
        raise database_unavailable() from error
    except DBAPIError as error:
        sqlstate = str(getattr(error.orig, "sqlstate", None) or "")
        if sqlstate in CONFLICT_SQLSTATES:
            raise RetryTransactionError from error
        if error.connection_invalidated or sqlstate.startswith(UNAVAILABLE_SQLSTATE_CLASSES):
            raise database_unavailable() from error
        raise
    except (OSError, TimeoutError) as error:
        raise database_unavailable() from error


def database_unavailable() -> PointbookError:
    """Tell that the database is away or too busy."""
    return PointbookError(
        Reason.DATABASE_UNAVAILABLE,
        "The database does not answer right now; retry.",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )
