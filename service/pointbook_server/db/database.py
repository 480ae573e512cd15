"""Access to the database: connections, and transactions with retries.

Statements are built with SQLAlchemy Core, compiled to SQL once, and run by asyncpg: running a statement through
SQLAlchemy costs ten times as much.
"""

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cached_property, partial
from time import monotonic
from typing import Any, TypeVar

import asyncpg
import structlog
from sqlalchemy import Executable, text
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from pointbook_common.errors import SettingError
from pointbook_server.db.connection_pool import DRIVER_ERRORS, ConnectionPool, roll_back
from pointbook_server.db.errors import (
    READ_ONLY_SQLSTATE,
    UNAVAILABLE_SQLSTATES,
    LoginRefusedError,
    RetryTransactionError,
    database_errors,
    sqlstate_of,
)
from pointbook_server.metrics import DatabaseMetrics, Metrics

TRANSACTION_ATTEMPTS_MAX = 6
RETRY_DELAY_SECONDS = 0.02
CONNECT_TIMEOUT_SECONDS = 5.0
COMMAND_TIMEOUT_SECONDS = 20.0
STREAM_ROWS = 500
STREAM_TIMEOUT_SECONDS = 6 * 3_600.0
SESSION_SETTINGS = {
    "application_name": "pointbook",
    "jit": "off",
    "lock_timeout": "5s",
    "statement_timeout": "15s",
    # Folding a very long history takes a while, with its account locked.
    "idle_in_transaction_session_timeout": "120s",
}
PLANNED_ONCE = {"plan_cache_mode": "force_generic_plan", "enable_seqscan": "off"}
"""Plan statements that commit by themselves once per connection, because planning takes longer than running them.

A plan may be made while a table is empty and must be right for a full one. So each of these statements uses an index
for every table, and its joins are written so that the planner has only one order.
"""
SET_UP_CITUS = """
    SELECT set_config('plan_cache_mode', 'auto', false), set_config('citus.override_table_visibility', 'off', false)
    FROM pg_extension WHERE extname = 'citus'
"""
"""Settings of a session on Citus.

A generic plan cannot find the shard of most statements, so PostgreSQL chooses. Citus hides shards from look-ups in the
catalogue, which takes seconds for each look-up of array types that the driver makes.
"""
PLANNED_EACH_TIME = "SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL enable_seqscan = on"
BEGIN = f"BEGIN; {PLANNED_EACH_TIME}"
BEGIN_SNAPSHOT = f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {PLANNED_EACH_TIME}"
PACKAGE = "pointbook_server."
UNNAMED = "unnamed"
COMMIT = "transaction.commit"
"""The name of COMMIT among the statements in metrics."""
OUTAGE_PAUSE_SECONDS = 30.0
"""An outage of the same kind is logged again after this long without one."""
OUTAGE_KINDS_MAX = 100
DIALECT = PGDialect_asyncpg()  # type: ignore[no-untyped-call] # SQLAlchemy does not type it

T = TypeVar("T")

log = structlog.get_logger()


class Row(asyncpg.Record):  # type: ignore[misc] # asyncpg is not typed
    """A row of a result, with its columns as attributes."""

    def __getattr__(self, name: str) -> Any:
        """Return a column."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Statement:
    """A statement of SQLAlchemy Core, compiled to SQL once.

    Lists are passed as arrays (`any_`), so that the SQL does not depend on the parameters; JSON is read and written as
    text.
    """

    def __init__(self, statement: Executable, name: str = "") -> None:
        if name:
            self.name = name
        compiled: Any = statement.compile(dialect=DIALECT)  # type: ignore[attr-defined] # every Core statement has this method
        self.sql = compiled.string
        self._names: tuple[str, ...] = tuple(compiled.positiontup or ())
        self._values: Mapping[str, Any] = compiled.params

    @cached_property
    def name(self) -> str:
        """The name in metrics: that of the constant which is this statement.

        An example is `ledger.lock_accounts`. A statement that no constant holds is given a name.
        """
        for path, module in list(sys.modules.items()):
            if path.startswith(PACKAGE):
                for name, value in vars(module).items():
                    if value is self and name.isupper():
                        capability = path.removeprefix(PACKAGE).removesuffix(".queries")
                        return f"{capability}.{name.lower()}"
        return UNNAMED

    def arguments(self, values: Mapping[str, Any]) -> list[Any]:
        """Return values in the order of the SQL's parameters.

        Values built into the statement are added.
        """
        if not values:
            return [self._values[name] for name in self._names]
        return [values[name] if name in values else self._values[name] for name in self._names]


class Connection:
    """A pooled connection while it is in use.

    `observe` gets the name and the time in seconds of each statement that has succeeded.
    """

    def __init__(self, driver: Any, observe: Callable[[str, float], None]) -> None:
        self._driver = driver
        self._observe = observe

    async def fetch(self, statement: Statement, values: Mapping[str, Any] | None = None) -> list[Row]:
        """Run a statement, and return its rows."""
        started = monotonic()
        rows: list[Row] = await self._driver.fetch(statement.sql, *statement.arguments(values or {}))
        self._observe(statement.name, monotonic() - started)
        return rows

    async def fetch_one(self, statement: Statement, values: Mapping[str, Any] | None = None) -> Row | None:
        """Run a statement, and return its first row, or None."""
        started = monotonic()
        row: Row | None = await self._driver.fetchrow(statement.sql, *statement.arguments(values or {}))
        self._observe(statement.name, monotonic() - started)
        return row

    async def stream(self, statement: Statement, values: Mapping[str, Any] | None = None) -> AsyncIterator[Row]:
        """Run a statement inside a transaction, and yield its rows as they are consumed.

        Several streams of one connection can be read in turn.
        """
        arguments = statement.arguments(values or {})
        # The first row can take as long as the database needs to sort all of them.
        rows = self._driver.cursor(statement.sql, *arguments, prefetch=STREAM_ROWS, timeout=STREAM_TIMEOUT_SECONDS)
        async for row in rows:
            yield row

    async def execute(self, statement: Statement, values: Mapping[str, Any] | None = None) -> None:
        """Run a statement without reading a result."""
        started = monotonic()
        await self._driver.execute(statement.sql, *statement.arguments(values or {}))
        self._observe(statement.name, monotonic() - started)

    async def count_written(self, statement: Statement, values: Mapping[str, Any] | None = None) -> int:
        """Run a statement that returns each row it writes, and return their number.

        The command tag is not read: for INSERT ... SELECT ... ON CONFLICT, Citus counts the rows selected.
        """
        return len(await self.fetch(statement, values))


LIFT_TIME_LIMIT = Statement(text("SET LOCAL statement_timeout = 0"))
"""For a snapshot that reads the whole ledger: the limit is meant for calls."""
JOIN_BY_INDEX = Statement(
    text("""
        SELECT set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),
            set_config('enable_mergejoin', 'off', true)
    """)
)
"""For a transaction that looks up a thousand rows, one by one: the planner would rather read a table of 100,000."""


class Database:
    """Pools of connections. Close them with `dispose` after the last call has ended."""

    def __init__(self, url: str, *, pool_size: int, metrics: Metrics | None = None) -> None:
        self._metrics = DatabaseMetrics(metrics or Metrics())
        connect = partial(
            self._open,
            url,
            record_class=Row,
            timeout=CONNECT_TIMEOUT_SECONDS,
            command_timeout=COMMAND_TIMEOUT_SECONDS,
            server_settings=SESSION_SETTINGS | PLANNED_ONCE,
        )
        self._pool = ConnectionPool(connect, pool_size, self._metrics.observe_wait)
        self._metrics.watch_pool(lambda: self._pool.connections_in_use, pool_size)
        # Separate, so that a busy pool neither looks like a dead database nor delays the revocation of a token.
        self._health_pool = ConnectionPool(connect, 1)
        self._reserved_pool = ConnectionPool(connect, 1)
        self._outages = OutageLog()
        self.is_on_citus = False
        """Whether Citus distributes the tables by merchant; known once a connection is open."""
        self.on_unavailable: Callable[[str], None] = _ignore
        """Called with the SQLSTATE of each DATABASE_UNAVAILABLE, for example of a read-only database."""

    async def _open(self, *arguments: Any, **options: Any) -> Any:
        """Open a connection, with other settings on Citus."""
        driver = await _connect(*arguments, **options)
        try:
            self.is_on_citus = await driver.fetchval(SET_UP_CITUS) is not None
        except BaseException:
            driver.terminate()
            raise
        return driver

    @property
    def connections_in_use(self) -> int:
        """How many connections are in use by calls."""
        return self._pool.connections_in_use

    @property
    def has_connections(self) -> bool:
        """Whether any connection for calls is open."""
        return not self._pool.is_empty

    @property
    def answered_at(self) -> float:
        """When a call last returned a working connection, by the monotonic clock."""
        return self._pool.answered_at

    @asynccontextmanager
    async def autocommit(self, *, reports_outages: bool = True) -> AsyncIterator[Connection]:
        """Acquire a connection on which each statement commits by itself.

        A statement takes one round trip. Raises TRANSACTION_CONFLICT and DATABASE_UNAVAILABLE. A caller that does in
        another way what failed sets `reports_outages` to False: an outage fails there too.
        """
        with database_errors(self.note_outage) if reports_outages else database_errors():
            async with self._pool.acquire() as driver:
                yield Connection(driver, self._metrics.observe_statement)

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[Connection]:
        """Acquire the connection reserved for token look-ups, like `autocommit`.

        It is free even while calls use all others. The connection is terminated at once if the caller is cancelled.
        """
        with database_errors(self.note_outage):
            async with self._terminated_on_error(self._reserved_pool) as connection:
                yield connection

    async def transaction(self, work: Callable[[Connection], Awaitable[T]], *, planned_once: bool = False) -> T:
        """Run `work` in one transaction, and again after conflicts with other ones.

        With `planned_once`, its statements are planned like those that commit by themselves (PLANNED_ONCE).
        Raises TRANSACTION_CONFLICT after TRANSACTION_ATTEMPTS_MAX conflicts, and DATABASE_UNAVAILABLE.
        """
        sqlstate = ""
        for attempt in range(TRANSACTION_ATTEMPTS_MAX):
            if attempt:
                self._metrics.count_retry(sqlstate)
                await asyncio.sleep(random.uniform(0, RETRY_DELAY_SECONDS * 2**attempt))  # noqa: S311 - jitter
            try:
                with database_errors(self.note_outage):
                    return await self._run(work, "BEGIN" if planned_once else BEGIN)
            except RetryTransactionError as error:
                sqlstate = error.sqlstate
        raise RetryTransactionError

    async def _run(self, work: Callable[[Connection], Awaitable[T]], begin: str) -> T:
        """Run `work` in one transaction, to its end even if the caller is cancelled.

        Only the wait ends early.
        """

        async def run() -> T:
            async with self._pool.releasing(connection) as driver, self._transaction(driver, begin):
                return await work(Connection(driver, self._metrics.observe_statement))

        connection = await self._pool.claim()
        running = asyncio.create_task(run())
        running.add_done_callback(_consume_exception)
        return await asyncio.shield(running)

    async def snapshot(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run read-only `work` on one snapshot of the database.

        Raises TRANSACTION_CONFLICT and DATABASE_UNAVAILABLE.
        """
        with database_errors(self.note_outage):
            async with self._pool.acquire() as driver, self._transaction(driver, BEGIN_SNAPSHOT):
                return await work(Connection(driver, self._metrics.observe_statement))

    async def read_planned(self, statement: Statement, values: Mapping[str, Any] | None = None) -> list[Row]:
        """Return the rows of one statement, planned for this execution.

        It suits a statement that reads all merchants, which runs once a minute. Raises DATABASE_UNAVAILABLE.
        """
        return await self.snapshot(lambda connection: connection.fetch(statement, values))

    @asynccontextmanager
    async def health_connection(self) -> AsyncIterator[Connection]:
        """Acquire the connection reserved for health checks.

        Raises the driver's own errors. After any error the next check opens a new connection, to the server that new
        connections of calls reach.
        """
        async with self._terminated_on_error(self._health_pool) as connection:
            yield connection

    def renew_health_connection(self) -> None:
        """Open a new connection for the next health check."""
        self._health_pool.expire()

    def cut(self) -> None:
        """Terminate the connections of all calls, and refuse calls until `resume`.

        Refused calls get DATABASE_UNAVAILABLE.
        """
        self._pool.cut()

    def resume(self) -> None:
        """Open connections for calls again after `cut`."""
        self._pool.resume()

    async def dispose(self) -> None:
        """Close all connections; terminate those that are still in use after a moment."""
        await asyncio.gather(self._pool.close(), self._health_pool.close(), self._reserved_pool.close())

    @asynccontextmanager
    async def _transaction(self, driver: Any, begin: str) -> AsyncIterator[None]:
        """Run a transaction; its BEGIN and settings take one round trip."""
        await driver.execute(begin)
        try:
            yield
        except TimeoutError:
            driver.terminate()
            raise
        except BaseException:
            with suppress(*DRIVER_ERRORS):
                await roll_back(driver)
            raise
        started = monotonic()
        await driver.execute("COMMIT")
        self._metrics.observe_statement(COMMIT, monotonic() - started)

    @asynccontextmanager
    async def _terminated_on_error(self, pool: ConnectionPool) -> AsyncIterator[Connection]:
        """Acquire a connection that is terminated after any error, including cancellation."""
        async with pool.acquire() as driver:
            try:
                yield Connection(driver, self._metrics.observe_statement)
            except BaseException:
                driver.terminate()
                raise

    def note_outage(self, cause: BaseException) -> None:
        """Log an outage, report it, and replace connections to a read-only server."""
        self._outages.write(cause)
        sqlstate = sqlstate_of(cause)
        self._metrics.count_error(sqlstate or type(cause).__name__)
        if sqlstate == READ_ONLY_SQLSTATE:
            self._pool.expire()
        self.on_unavailable(sqlstate)


class OutageLog:
    """Logs each kind of outage when it starts, and again when it recurs after a pause."""

    def __init__(self) -> None:
        self._logged_at: dict[str, float] = {}

    def write(self, cause: BaseException) -> None:
        """Log an outage, unless one of the same SQLSTATE or class occurred a moment ago."""
        kind = sqlstate_of(cause) or type(cause).__name__
        now = time.monotonic()
        if now - self._logged_at.get(kind, float("-inf")) > OUTAGE_PAUSE_SECONDS:
            log.warning("the database refuses calls", sqlstate=sqlstate_of(cause), error=type(cause).__name__)
        if kind in self._logged_at or len(self._logged_at) < OUTAGE_KINDS_MAX:
            self._logged_at[kind] = now


def _ignore(_sqlstate: str) -> None:
    """Do nothing: the default without a health check."""


def _consume_exception(task: asyncio.Task[Any]) -> None:
    """Retrieve the exception so that asyncio does not log it as unhandled.

    It is raised in the caller, unless the caller was cancelled.
    """
    if not task.cancelled():
        task.exception()


async def _connect(*arguments: Any, **options: Any) -> Any:
    """Connect to the database.

    asyncpg parses the URL, including `sslmode`, as every other client of PostgreSQL does.
    """
    try:
        return await asyncpg.connect(*arguments, **options)
    except asyncpg.ClientConfigurationError as error:
        raise SettingError(f"POINTBOOK_DATABASE_URL: {error}") from error
    except asyncpg.PostgresError as error:
        if sqlstate_of(error).startswith(UNAVAILABLE_SQLSTATES):
            raise
        # Not caused by a statement, even if the SQLSTATE suggests it.
        raise LoginRefusedError(error) from error


def create_engine(url: str) -> AsyncEngine:
    """Return a SQLAlchemy engine for migrations.

    Its statements have no time limit in the client.
    """
    connect = partial(_connect, url, timeout=CONNECT_TIMEOUT_SECONDS, server_settings=SESSION_SETTINGS)
    return create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool, hide_parameters=True)
