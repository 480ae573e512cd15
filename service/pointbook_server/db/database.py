"""The way to the database: one pool, transactions that are retried whole, and errors told in our words.

Statements are built with SQLAlchemy Core, written out as SQL once, and run by asyncpg itself: SQLAlchemy's own way to
run a statement costs ten times what asyncpg's does.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, NoReturn, TypeVar

import asyncpg
import structlog
from sqlalchemy import Executable, text
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from pointbook_common.errors import SettingError
from pointbook_server.db.connection_pool import DRIVER_ERRORS, ConnectionPool, roll_back
from pointbook_server.errors import DatabaseDefectError, PointbookError, Reason

TRANSACTION_ATTEMPTS_MAX = 6
RETRY_DELAY_SECONDS = 0.02
CONNECT_TIMEOUT_SECONDS = 5.0
COMMAND_TIMEOUT_SECONDS = 20.0
STREAM_ROWS = 500
STREAM_TIMEOUT_SECONDS = 6 * 3_600.0
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
FOREIGN_KEY_SQLSTATE = "23503"
STORE_KEYS = frozenset({"fk_points_accounts_stores", "fk_store_erasures_stores"})
"""Foreign keys of what may be released at any moment: who relied on it finds that it is gone when it looks again."""
LOCK_TIMEOUT_SQLSTATE = "55P03"
"""The database is too busy: whoever waited so long does not wait again, since others in line have waited as well."""
READ_ONLY_SQLSTATE = "25006"
DISK_FULL_SQLSTATE = "53100"
REFUSAL_PAUSE_SECONDS = 30.0
"""After how long without it a refusal of the same kind is logged again."""
REFUSAL_KINDS_MAX = 100
UNAVAILABLE_SQLSTATES = ("08", READ_ONLY_SQLSTATE, "28", "3D", "53", "57")
"""Connection errors, a standby that only reads, refused logins, no such database, lack of resources, operator
intervention, by how their codes begin: it is away for us."""
DIALECT = PGDialect_asyncpg()  # type: ignore[no-untyped-call] # SQLAlchemy left it so

T = TypeVar("T")

log = structlog.get_logger()


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


class LoginRefusedError(ConnectionRefusedError):
    """The database gives no connection, with a code that means a defect of ours where a statement gets it."""

    def __init__(self, cause: asyncpg.PostgresError) -> None:
        super().__init__(str(cause))
        self.sqlstate = sqlstate_of(cause)


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
        connect = partial(
            _connect,
            url,
            record_class=Row,
            timeout=CONNECT_TIMEOUT_SECONDS,
            command_timeout=COMMAND_TIMEOUT_SECONDS,
            server_settings=SESSION_SETTINGS | PLANNED_ONCE,
        )
        self._pool = ConnectionPool(connect, pool_size)
        # A busy pool is no dead database, and revokes no token later.
        self._pulse = ConnectionPool(connect, 1)
        self._reserve = ConnectionPool(connect, 1)
        self._refusals = OutageLog()
        self.on_refusal: Callable[[str], None] = _ignore
        """Called with the SQLSTATE of each call that the database refuses as a whole, such as when it is read-only."""

    @property
    def connections_in_use(self) -> int:
        """How many connections calls have right now."""
        return self._pool.connections_in_use

    @property
    def has_connections(self) -> bool:
        """Whether any connection for calls is open."""
        return not self._pool.is_empty

    @property
    def answered_at(self) -> float:
        """When a call last finished with its connection in working order, on the monotonic clock."""
        return self._pool.answered_at

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator[Connection]:
        """Give a connection on which every statement commits by itself: one round trip for a single statement.

        Raises TRANSACTION_CONFLICT and DATABASE_UNAVAILABLE.
        """
        with database_errors(self._note_refusal):
            async with self._pool.acquire() as driver:
                yield Connection(driver)

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[Connection]:
        """Return the one connection that no call uses, as `autocommit` does: it is free while calls have all others.

        Where the caller gives up, the connection is terminated at once.
        """
        with database_errors(self._note_refusal):
            async with _given_up_at_once(self._reserve) as connection:
                yield connection

    async def transaction(self, work: Callable[[Connection], Awaitable[T]], *, planned_once: bool = False) -> T:
        """Run `work` in one transaction, again as a whole where the database refused it because of others.

        With `planned_once` its statements are planned as those are that commit by themselves (PLANNED_ONCE).
        Raises TRANSACTION_CONFLICT when it is refused too often, and DATABASE_UNAVAILABLE when the database is away.
        """
        for attempt in range(TRANSACTION_ATTEMPTS_MAX):
            if attempt:
                await asyncio.sleep(random.uniform(0, RETRY_DELAY_SECONDS * 2**attempt))  # noqa: S311 - only jitter
            try:
                with database_errors(self._note_refusal):
                    return await self._run(work, "BEGIN" if planned_once else BEGIN)
            except RetryTransactionError:
                continue
        raise RetryTransactionError

    async def _run(self, work: Callable[[Connection], Awaitable[T]], begin: str) -> T:
        """Run `work` in one transaction, to its end even where the caller goes away: only the wait is given up."""

        async def run() -> T:
            async with self._pool.returning(taken) as driver, _transaction(driver, begin):
                return await work(Connection(driver))

        taken = await self._pool.take()
        running = asyncio.create_task(run())
        running.add_done_callback(_hear_out)
        return await asyncio.shield(running)

    async def snapshot(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work`, whose several statements only read, on one unchanging state of the database.

        Raises TRANSACTION_CONFLICT and DATABASE_UNAVAILABLE.
        """
        with database_errors(self._note_refusal):
            async with self._pool.acquire() as driver, _transaction(driver, BEGIN_SNAPSHOT):
                return await work(Connection(driver))

    @asynccontextmanager
    async def pulse(self) -> AsyncIterator[Connection]:
        """Return the connection that is reserved for health checks. Raises the driver's own errors.

        After any error the next one is a new connection, which leads where calls' new connections lead.
        """
        async with _given_up_at_once(self._pulse) as connection:
            yield connection

    def renew_pulse(self) -> None:
        """Make the next health check open a new connection."""
        self._pulse.expire()

    def cut(self) -> None:
        """Terminate the connections of all calls, and refuse calls with DATABASE_UNAVAILABLE until `resume`."""
        self._pool.cut()

    def resume(self) -> None:
        """Open connections for calls again after `cut`."""
        self._pool.resume()

    async def dispose(self) -> None:
        """Close all connections, and cut those that are still in use after a moment."""
        await asyncio.gather(self._pool.close(), self._pulse.close(), self._reserve.close())

    def _note_refusal(self, cause: BaseException) -> None:
        """Log why the database refuses calls, drop connections that only read, and pass the SQLSTATE on."""
        self._refusals.note(cause)
        sqlstate = sqlstate_of(cause)
        if sqlstate == READ_ONLY_SQLSTATE:
            self._pool.expire()
        self.on_refusal(sqlstate)


class OutageLog:
    """Logs each kind of refusal when it begins, and again when it comes back after a pause."""

    def __init__(self) -> None:
        self._noted_at: dict[str, float] = {}

    def note(self, cause: BaseException) -> None:
        """Log a refusal, unless one of the same SQLSTATE or class was noted a moment ago."""
        kind = sqlstate_of(cause) or type(cause).__name__
        now = time.monotonic()
        if now - self._noted_at.get(kind, float("-inf")) > REFUSAL_PAUSE_SECONDS:
            log.warning("the database refuses calls", sqlstate=sqlstate_of(cause), error=type(cause).__name__)
        if kind in self._noted_at or len(self._noted_at) < REFUSAL_KINDS_MAX:
            self._noted_at[kind] = now


def _ignore(_sqlstate: str) -> None:
    """Do nothing, where no health check listens."""


@asynccontextmanager
async def _given_up_at_once(pool: ConnectionPool) -> AsyncIterator[Connection]:
    """Return a connection that is terminated after any error, a caller that gives up included."""
    async with pool.acquire() as driver:
        try:
            yield Connection(driver)
        except BaseException:
            driver.terminate()
            raise


@asynccontextmanager
async def _transaction(driver: Any, begin: str) -> AsyncIterator[None]:
    """Run a transaction that begins, settings included, in one round trip."""
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
    await driver.execute("COMMIT")


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
    except asyncpg.PostgresError as error:
        if sqlstate_of(error).startswith(UNAVAILABLE_SQLSTATES):
            raise
        # No statement of ours is to blame, whatever the code says.
        raise LoginRefusedError(error) from error


def create_engine(url: str) -> AsyncEngine:
    """Make an engine of SQLAlchemy, for migrations, whose statements may take as long as they need."""
    connect = partial(_connect, url, timeout=CONNECT_TIMEOUT_SECONDS, server_settings=SESSION_SETTINGS)
    return create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool, hide_parameters=True)


@contextmanager
def database_errors(on_refusal: Callable[[BaseException], None] = lambda _cause: None) -> Iterator[None]:
    """Turn what the driver raises into our errors, none of which quotes a row or a parameter.

    `on_refusal` is called with the driver's error where it becomes DATABASE_UNAVAILABLE.
    """
    try:
        yield
    except DBAPIError as error:
        # SQLAlchemy wraps what it heard from the driver twice.
        _raise_told(error.orig.__cause__ if error.orig else None, on_refusal)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        _raise_told(error, on_refusal)
    except (OSError, TimeoutError) as error:
        on_refusal(error)
        raise database_unavailable() from error


def sqlstate_of(cause: BaseException | None) -> str:
    """Return the SQLSTATE of an error of the driver, or an empty string."""
    return str(getattr(cause, "sqlstate", None) or "")


def _raise_told(cause: Any, on_refusal: Callable[[BaseException], None]) -> NoReturn:
    """Raise an error of the driver as one of ours; a defect of ours loses its cause, which would be logged."""
    told = _told(cause)
    if isinstance(told, PointbookError) and told.reason is Reason.DATABASE_UNAVAILABLE:
        on_refusal(cause)
    raise told from (None if isinstance(told, DatabaseDefectError) else cause)


def _told(cause: Any) -> Exception:
    """Tell an error of the driver in our words."""
    sqlstate = sqlstate_of(cause)
    constraint = getattr(cause, "constraint_name", None) or ""
    is_released = sqlstate == FOREIGN_KEY_SQLSTATE and constraint in STORE_KEYS
    # A migration changed what a statement returns that was prepared before; the next attempt prepares it anew.
    is_outdated = isinstance(cause, (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError))
    if sqlstate in CONFLICT_SQLSTATES or is_outdated or is_released:
        return RetryTransactionError()
    if isinstance(cause, asyncpg.DataError):
        return DatabaseDefectError("a statement was given a parameter of another type")
    # The driver loses its thread when the database ends a connection just as a statement begins on it.
    is_driver = isinstance(cause, (asyncpg.InterfaceError, asyncpg.InternalClientError))
    if is_driver or sqlstate == LOCK_TIMEOUT_SQLSTATE or sqlstate.startswith(UNAVAILABLE_SQLSTATES):
        return database_unavailable()
    return DatabaseDefectError(f"{sqlstate}: {cause.args[0]}", constraint)


def database_unavailable() -> PointbookError:
    """Tell that the database is away or too busy."""
    return PointbookError(
        Reason.DATABASE_UNAVAILABLE,
        "The database does not answer right now; retry.",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )
