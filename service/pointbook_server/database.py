"""The way to the database: one pool, transactions that are retried whole, and errors told in our words.

Statements are built with SQLAlchemy Core, written out as SQL once, and run by asyncpg itself: SQLAlchemy's own way to
run a statement costs ten times what asyncpg's does.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, NoReturn, TypeVar

import asyncpg
from sqlalchemy import Executable, text
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from pointbook_server.errors import DatabaseDefectError, PointbookError, Reason, SettingError

TRANSACTION_ATTEMPTS_MAX = 6
RETRY_DELAY_SECONDS = 0.02
POOL_TIMEOUT_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 5.0
COMMAND_TIMEOUT_SECONDS = 20.0
STREAM_ROWS = 500
STREAM_TIMEOUT_SECONDS = 6 * 3_600.0
QUERIES_MAX = 1_000_000
"""After how many queries a connection is replaced, so that what the database caches for it stays bounded."""
CLOSE_TIMEOUT_SECONDS = 1.0
"""How long a closing pool waits for transactions whose callers are gone: a server has 10 s to stop in all."""
RETRY_AFTER_SECONDS = 1.0
SESSION_SETTINGS = {
    "application_name": "pointbook",
    "jit": "off",
    "lock_timeout": "5s",
    "statement_timeout": "15s",
    # A fold of a very long history takes its time, while its account is locked.
    "idle_in_transaction_session_timeout": "120s",
}
PLANNED_ONCE = {"plan_cache_mode": "force_generic_plan", "enable_seqscan": "off"}
"""How statements are planned that commit by themselves: once a connection, since planning takes longer than running.

A plan may be made while a table is empty, and must be right for a full one. So each of these statements goes by an
index for every table, and in one order: what joins others is written so that there is no choice.
"""
PLANNED_EACH_TIME = "SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL enable_seqscan = on"
BEGIN = f"BEGIN; {PLANNED_EACH_TIME}"
BEGIN_SNAPSHOT = f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {PLANNED_EACH_TIME}"
CONFLICT_SQLSTATES = frozenset({"40001", "40P01", "22012"})
"""Serialization failure and deadlock: the transaction had no effect, and may well succeed again.

Division by zero is how a statement of ours breaks itself off, because others have changed what it relies on.
"""
LOCK_TIMEOUT_SQLSTATE = "55P03"
"""The database is too busy: whoever waited so long does not wait again, since others in line have waited as well."""
UNAVAILABLE_SQLSTATES = ("08", "25006", "28", "3D", "53", "57")
"""Connection errors, a standby that only reads, refused logins, no such database, lack of resources, operator
intervention, by how their codes begin: it is away for us."""
DIALECT = PGDialect_asyncpg()  # type: ignore[no-untyped-call] # SQLAlchemy left it so

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


class Row(asyncpg.Record):  # type: ignore[misc] # asyncpg has no types
    """A row of an answer, whose columns are attributes."""

    def __getattr__(self, name: str) -> Any:
        """Read a column."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Statement:
    """A statement of SQLAlchemy Core, written out as SQL: once for those that every call runs.

    Lists are parameters as arrays (`any_`), since the text of a statement does not depend on its parameters; JSON is
    read and written as text.
    """

    def __init__(self, statement: Executable) -> None:
        compiled: Any = statement.compile(dialect=DIALECT)  # type: ignore[attr-defined] # every Core statement has it
        self.sql = compiled.string
        self._names: tuple[str, ...] = tuple(compiled.positiontup or ())
        self._values: Mapping[str, Any] = compiled.params

    def arguments(self, values: Mapping[str, Any]) -> list[Any]:
        """Order values as the SQL numbers them; one that the statement was built with needs none."""
        if not values:
            return [self._values[name] for name in self._names]
        return [values[name] if name in values else self._values[name] for name in self._names]


class Connection:
    """A connection of the pool while somebody uses it."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    async def fetch(self, statement: Statement, values: Mapping[str, Any] | None = None) -> list[Row]:
        """Run a statement and read its rows."""
        rows: list[Row] = await self._driver.fetch(statement.sql, *statement.arguments(values or {}))
        return rows

    async def fetch_one(self, statement: Statement, values: Mapping[str, Any] | None = None) -> Row | None:
        """Run a statement that answers one row at most."""
        row: Row | None = await self._driver.fetchrow(statement.sql, *statement.arguments(values or {}))
        return row

    async def stream(self, statement: Statement, values: Mapping[str, Any] | None = None) -> AsyncIterator[Row]:
        """Run a statement inside a transaction and read its rows as they are asked for, however many there are.

        Several streams of one connection may be read in turn.
        """
        arguments = statement.arguments(values or {})
        # The first row may take as long as it takes the database to sort them all.
        rows = self._driver.cursor(statement.sql, *arguments, prefetch=STREAM_ROWS, timeout=STREAM_TIMEOUT_SECONDS)
        async for row in rows:
            yield row

    async def execute(self, statement: Statement, values: Mapping[str, Any] | None = None) -> int:
        """Run a statement and tell how many rows it wrote."""
        status: str = await self._driver.execute(statement.sql, *statement.arguments(values or {}))
        count = status.rpartition(" ")[2]
        return int(count) if count.isdigit() else 0


LIFT_TIME_LIMIT = Statement(text("SET LOCAL statement_timeout = 0"))
"""For a snapshot that reads the whole book: the limit is for calls that somebody waits for."""


class Database:
    """A pool of connections with our rules. Close it with `dispose` when no call is running any more."""

    def __init__(self, url: str, *, pool_size: int) -> None:
        self._pool = _Pool(url, pool_size)
        # A busy pool is no dead database, so that the pulse has a connection of its own.
        self._pulse = _Pool(url, 1)

    @property
    def connections_in_use(self) -> int:
        """How many connections calls have right now."""
        return self._pool.connections_in_use

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator[Connection]:
        """Give a connection on which every statement commits by itself: one round trip for a single statement.

        Raises TRANSACTION_CONFLICT and DATABASE_UNAVAILABLE.
        """
        with database_errors():
            async with self._pool.acquire() as driver:
                yield Connection(driver)

    async def transaction(self, work: Callable[[Connection], Awaitable[T]], *, planned_once: bool = False) -> T:
        """Run `work` in one transaction, again as a whole where the database refused it because of others.

        With `planned_once` its statements are planned as those are that commit by themselves (PLANNED_ONCE).
        Raises TRANSACTION_CONFLICT when it is refused too often, and DATABASE_UNAVAILABLE when the database is away.
        """
        for attempt in range(TRANSACTION_ATTEMPTS_MAX):
            if attempt:
                await asyncio.sleep(random.uniform(0, RETRY_DELAY_SECONDS * 2**attempt))  # noqa: S311 - only jitter
            try:
                with database_errors():
                    return await self._run(work, "BEGIN" if planned_once else BEGIN)
            except RetryTransactionError:
                continue
        raise RetryTransactionError

    async def _run(self, work: Callable[[Connection], Awaitable[T]], begin: str) -> T:
        """Run `work` in one transaction, to its end even where the caller goes away: only the wait is given up."""

        async def run() -> T:
            try:
                async with _transaction(driver, begin):
                    return await work(Connection(driver))
            finally:
                await self._pool.give_back(driver)

        driver = await self._pool.take()
        running = asyncio.create_task(run())
        running.add_done_callback(_hear_out)
        return await asyncio.shield(running)

    async def snapshot(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work`, whose several statements only read, on one unchanging state of the database.

        Raises TRANSACTION_CONFLICT and DATABASE_UNAVAILABLE.
        """
        with database_errors():
            async with self._pool.acquire() as driver, _transaction(driver, BEGIN_SNAPSHOT):
                return await work(Connection(driver))

    @asynccontextmanager
    async def pulse(self) -> AsyncIterator[Connection]:
        """Return the connection that is reserved for health checks. Raises the driver's own errors."""
        async with self._pulse.acquire() as driver:
            try:
                yield Connection(driver)
            except asyncio.CancelledError:
                # Where the database hangs, to end the statement in order would take as long as any other one.
                driver.terminate()
                raise

    async def dispose(self) -> None:
        """Close all connections, and cut those that are still in use after a moment."""
        await asyncio.gather(self._pool.close(), self._pulse.close())


class _Pool:
    """asyncpg's pool, made when it is first used: it belongs to the event loop that runs by then."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._size = size
        self._pool: Any = None

    @property
    def connections_in_use(self) -> int:
        return 0 if self._pool is None else int(self._pool.get_size() - self._pool.get_idle_size())

    async def take(self) -> Any:
        if self._pool is None:
            # Nothing is awaited in here with a size of 0 to begin with, so that no other task comes between.
            self._pool = await asyncpg.create_pool(
                self._url,
                min_size=0,
                max_size=self._size,
                max_queries=QUERIES_MAX,
                connect=_connect,
                reset=_leave_as_it_is,
                record_class=Row,
                timeout=CONNECT_TIMEOUT_SECONDS,
                command_timeout=COMMAND_TIMEOUT_SECONDS,
                server_settings=SESSION_SETTINGS | PLANNED_ONCE,
            )
        # The pool's own time limit would cost a task a call.
        async with asyncio.timeout(POOL_TIMEOUT_SECONDS):
            return await self._pool.acquire()

    async def give_back(self, driver: Any) -> None:
        await self._pool.release(driver)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Any]:
        driver = await self.take()
        try:
            yield driver
        except (asyncio.CancelledError, TimeoutError):
            await _end(driver)
            raise
        finally:
            await self.give_back(driver)

    async def close(self) -> None:
        if self._pool is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()


@asynccontextmanager
async def _transaction(driver: Any, begin: str) -> AsyncIterator[None]:
    """Run a transaction that begins, settings included, in one round trip."""
    await driver.execute(begin)
    try:
        yield
    except BaseException:
        # A connection that is lost has taken its transaction with it.
        if not driver.is_closed() and driver.is_in_transaction():
            await driver.execute("ROLLBACK")
        raise
    await driver.execute("COMMIT")


async def _end(driver: Any) -> None:
    """End what a call began that was broken off anywhere, for whoever has the connection next.

    Between preparing a statement and running it, the driver has not told the database yet where a transaction ends:
    the next statement does. Where it fails, the transaction has, or the connection is lost.
    """
    broken = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
    with suppress(*broken):
        await driver.execute("SELECT")
    with suppress(*broken):
        if driver.is_in_transaction():
            await driver.execute("ROLLBACK")


def _hear_out(task: asyncio.Task[Any]) -> None:
    """Hear a task's error, which nobody else does where the caller has gone away."""
    if not task.cancelled():
        task.exception()


async def _connect(*arguments: Any, **options: Any) -> Any:
    """Connect. asyncpg reads the URL, so that it means what it means to every other client, `sslmode` included."""
    try:
        return await asyncpg.connect(*arguments, **options)
    except asyncpg.ClientConfigurationError as error:
        raise SettingError(f"POINTBOOK_DATABASE_URL: {error}") from error


async def _leave_as_it_is(_driver: Any) -> None:
    """Spare a round trip whenever a connection comes back: nobody of ours changes a session."""


def create_engine(url: str) -> AsyncEngine:
    """Make an engine of SQLAlchemy, for migrations, whose statements may take as long as they need."""
    connect = partial(_connect, url, timeout=CONNECT_TIMEOUT_SECONDS, server_settings=SESSION_SETTINGS)
    return create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool, hide_parameters=True)


@contextmanager
def database_errors() -> Iterator[None]:
    """Turn what the driver raises into our errors, none of which quotes a row or a parameter."""
    try:
        yield
    except DBAPIError as error:
        # SQLAlchemy wraps what it heard from the driver twice.
        _raise_told(error.orig.__cause__ if error.orig else None)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        _raise_told(error)
    except (OSError, TimeoutError) as error:
        raise database_unavailable() from error


def _raise_told(cause: Any) -> NoReturn:
    """Raise an error of the driver as one of ours; a defect of ours loses its cause, which would be logged."""
    told = _told(cause)
    raise told from (None if isinstance(told, DatabaseDefectError) else cause)


def _told(cause: Any) -> Exception:
    """Tell an error of the driver in our words."""
    sqlstate = str(getattr(cause, "sqlstate", None) or "")
    if sqlstate in CONFLICT_SQLSTATES:
        return RetryTransactionError()
    if isinstance(cause, asyncpg.DataError):
        return DatabaseDefectError("a statement was given a parameter of another type")
    # The driver loses its thread when the database ends a connection just as a statement begins on it.
    is_driver = isinstance(cause, (asyncpg.InterfaceError, asyncpg.InternalClientError))
    if is_driver or sqlstate == LOCK_TIMEOUT_SQLSTATE or sqlstate.startswith(UNAVAILABLE_SQLSTATES):
        return database_unavailable()
    return DatabaseDefectError(f"{sqlstate}: {cause.args[0]}", getattr(cause, "constraint_name", None) or "")


def database_unavailable() -> PointbookError:
    """Tell that the database is away or too busy."""
    return PointbookError(
        Reason.DATABASE_UNAVAILABLE,
        "The database does not answer right now; retry.",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )
