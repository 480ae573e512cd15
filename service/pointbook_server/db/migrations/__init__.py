"""The migrations of the schema, and the functions that run them.

Each migration has a transaction of its own, or commits step by step. None waits long for a lock: the calls that come
after it would wait behind it.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from pointbook_server.db import citus
from pointbook_server.db.database import create_engine
from pointbook_server.db.errors import DEADLOCK_SQLSTATE, LOCK_TIMEOUT_SQLSTATE, database_errors, sqlstate_of
from pointbook_server.db.migrations.operations import LOCK_TIMEOUT
from pointbook_server.db.migrations.revisions import (
    Revision,
    StoredRevision,
    all_revisions,
    breaks_running_release,
    find_problem,
    pending_revisions,
)
from pointbook_server.errors import UnusableDatabaseError

LOCK_KEY = 0x706F696E74
"""The advisory lock that serializes migrating processes."""
POLL_SECONDS = 0.2
LOCK_WAIT_SECONDS = 60.0
"""How long a migration repeats its attempts to get its locks."""
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""The pauses between attempts, in which the calls that waited run; the last one repeats."""
BLOCKED_SQLSTATES = frozenset({LOCK_TIMEOUT_SQLSTATE, DEADLOCK_SQLSTATE})
_EXISTS = text("SELECT to_regclass('alembic_version') IS NOT NULL")
# As Alembic creates it.
_CREATE = text("""
    CREATE TABLE alembic_version (
        version_num character varying(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
    )
""")
# The column is missing before revision 0029.
_STORED = text("SELECT version_num, to_jsonb(v) ->> 'compatible_from' AS compatible_from FROM alembic_version AS v")
_PROMISE = text("UPDATE alembic_version SET compatible_from = :number")
_UPDATE = text("UPDATE alembic_version SET version_num = :number")
_INSERT = text("INSERT INTO alembic_version (version_num) VALUES (:number)")
_MIGRATING_PROCESS = text("""
    SELECT pid FROM pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1 AND (classid::bigint << 32 | objid::bigint) = :key AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
""")
_OLDEST_TRANSACTION = text("""
    SELECT pid, application_name, extract(epoch FROM clock_timestamp() - xact_start)::bigint AS seconds
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
    ORDER BY xact_start LIMIT 1
""")

T = TypeVar("T")


class MigrationError(UnusableDatabaseError):
    """A migration cannot run.

    The message is one line with the cause and the remedy.
    """


async def migrate(
    url: str,
    *,
    on_citus: bool = False,
    offline: bool = False,
    lock_wait_seconds: float = LOCK_WAIT_SECONDS,
    revisions: Sequence[Revision] | None = None,
    report: Callable[[str], None] = lambda _line: None,
) -> tuple[str | None, str | None]:
    """Apply the revisions that a database lacks, by default those of this release.

    Returns the database's revision before and after. A newer database that this release can use stays as it is. If a
    revision fails, the earlier ones stay applied. `report` is called with one line for each attempt that got no lock,
    and if another process migrates the database.

    Raises DATABASE_UNAVAILABLE; MigrationError if a revision gets no lock for `lock_wait_seconds`, if it takes away
    what servers may still use and they are not `offline`, or if the database is newer and this release cannot use it;
    CitusError if the tables are distributed but not `on_citus`: new tables would stay on one node.
    """
    revisions = all_revisions() if revisions is None else revisions
    async with _exclusive_connection(url, report) as connection:
        stored = await connection.run_sync(_in_transaction, _read_stored)
        pending = _plan(stored, revisions, offline=offline)
        is_distributed = await connection.run_sync(_in_transaction, citus.is_distributed)
        if is_distributed and not on_citus:
            raise citus.CitusError("the tables are distributed by Citus: run `pointbook migrate --citus`")
        for revision in pending:
            await _apply_in_time(connection, revision, lock_wait_seconds, report, is_distributed=is_distributed)
    return stored.number, pending[-1].number if pending else stored.number


async def check_cluster(url: str) -> None:
    """Raise CitusError if the tables cannot be distributed.

    Raises DATABASE_UNAVAILABLE.
    """
    async with _connection(url) as connection:
        await connection.run_sync(_in_transaction, citus.check_cluster)


async def distribute(url: str) -> list[str]:
    """Distribute the tables that are still local, and return their names.

    All in one transaction, with the types of rows. The database is at the newest revision. Raises CitusError and
    DATABASE_UNAVAILABLE.
    """
    async with _exclusive_connection(url) as connection:
        return await connection.run_sync(_in_transaction, _distribute)


async def read_stored_revision(url: str) -> StoredRevision:
    """Return what a database stores about its schema; write nothing.

    Raises DATABASE_UNAVAILABLE.
    """
    async with _connection(url) as connection:
        return await connection.run_sync(_in_transaction, _read_stored)


def _plan(stored: StoredRevision, revisions: Sequence[Revision], *, offline: bool) -> tuple[Revision, ...]:
    """Return the pending revisions.

    Raises MigrationError if the database is newer and cannot be used, or if servers on it can run and could not use the
    result.
    """
    pending = pending_revisions(stored, revisions)
    if not pending and (problem := find_problem(stored, revisions)):
        raise MigrationError(problem)
    for revision in () if offline else pending:
        if breaks_running_release(revision, stored, revisions):
            raise MigrationError(
                f"servers of revision {stored.number} cannot use the schema after migration {revision.number}: "
                f"first install a release of revision {revision.compatible_from} or later, or stop all servers and "
                "add --offline"
            )
    return pending


@asynccontextmanager
async def _connection(url: str) -> AsyncIterator[AsyncConnection]:
    """Open a connection whose statements may take long."""
    engine = create_engine(url)
    try:
        with database_errors():
            async with engine.connect() as connection:
                await connection.run_sync(_in_transaction, _lift_limits)
                yield connection
    finally:
        await engine.dispose()


@asynccontextmanager
async def _exclusive_connection(
    url: str, report: Callable[[str], None] = lambda _line: None
) -> AsyncIterator[AsyncConnection]:
    """Open the connection that only one migrating process has at a time.

    The wait for it has no limit, and is reported, since a process that was killed has its lock until its last
    statement ends. The lock belongs to the session, and the wait is a poll: an index that is built while
    writes continue waits for all transactions that are older than it, and so for one that waits for the lock.
    """
    async with _connection(url) as connection:
        if not await connection.run_sync(_in_transaction, _try_lock):
            report(await connection.run_sync(_in_transaction, _describe_migrating_process))
            while not await connection.run_sync(_in_transaction, _try_lock):  # noqa: ASYNC110 - nothing sets an event
                await asyncio.sleep(POLL_SECONDS)
        yield connection


async def _apply_in_time(
    connection: AsyncConnection,
    revision: Revision,
    seconds: float,
    report: Callable[[str], None],
    *,
    is_distributed: bool,
) -> None:
    """Apply a revision, with further attempts while other transactions have its locks.

    Raises MigrationError after `seconds`.
    """
    began = time.monotonic()
    for attempt in itertools.count():
        try:
            await connection.run_sync(_apply, revision, is_distributed=is_distributed)
        except DBAPIError as error:
            if sqlstate_of(error.orig.__cause__ if error.orig else None) not in BLOCKED_SQLSTATES:
                raise
        else:
            return
        other = await connection.run_sync(_in_transaction, _describe_oldest_transaction)
        if time.monotonic() - began >= seconds:
            raise MigrationError(
                f"migration {revision.number} got no lock in {seconds:g} s: other transactions use its tables{other}. "
                "End them, or run `pointbook migrate` again, with a longer --lock-wait. Earlier migrations stay applied"
            )
        report(f"migration {revision.number} waits for other transactions{other}")
        await asyncio.sleep(PAUSES_SECONDS[min(attempt, len(PAUSES_SECONDS) - 1)])


def _apply(connection: Connection, revision: Revision, *, is_distributed: bool) -> None:
    """Apply a revision once, in a transaction unless it commits step by step."""

    def work(connection: Connection) -> None:
        if is_distributed:
            citus.prepare_transaction(connection)
        # After Citus's settings, which pass it on to the workers.
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
        _run_revision(connection, revision)

    if revision.in_transaction:
        _in_transaction(connection, work)
    else:
        with connection.execution_options(isolation_level="AUTOCOMMIT").begin():
            connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
            _run_revision(connection, revision)


def _run_revision(connection: Connection, revision: Revision) -> None:
    """Run a revision and store its number.

    The promise to earlier releases is changed first: they must not see a part of what breaks them.
    """
    if revision.compatible_from:
        connection.execute(_PROMISE, {"number": revision.compatible_from})
    with Operations.context(MigrationContext.configure(connection)):
        revision.upgrade()
    if not connection.scalar(_EXISTS):
        connection.execute(_CREATE)
    if not connection.execute(_UPDATE, {"number": revision.number}).rowcount:
        connection.execute(_INSERT, {"number": revision.number})


def _in_transaction(connection: Connection, work: Callable[[Connection], T]) -> T:
    """Run a function in one transaction."""
    with connection.execution_options(isolation_level="READ COMMITTED").begin():
        return work(connection)


def _lift_limits(connection: Connection) -> None:
    """Lift the limits of calls, for the session."""
    connection.execute(text("SET statement_timeout = 0"))
    connection.execute(text("SET lock_timeout = 0"))


def _try_lock(connection: Connection) -> bool:
    return bool(connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK_KEY}))


def _describe_migrating_process(connection: Connection) -> str:
    pid = connection.scalar(_MIGRATING_PROCESS, {"key": LOCK_KEY})
    holder = f", process {pid} of PostgreSQL" if pid else ""
    return f"waits for another migration of this database{holder}"


def _read_stored(connection: Connection) -> StoredRevision:
    if not connection.scalar(_EXISTS):
        return StoredRevision(None)
    row = connection.execute(_STORED).first()
    return StoredRevision(row.version_num, row.compatible_from) if row else StoredRevision(None)


def _describe_oldest_transaction(connection: Connection) -> str:
    """Return a clause about the oldest other transaction; empty without one.

    It most often has the lock.
    """
    row = connection.execute(_OLDEST_TRANSACTION).first()
    if row is None:
        return ""
    name = f" of {row.application_name}" if row.application_name else ""
    return f"; the oldest, of process {row.pid}{name}, began {row.seconds} s ago"


def _distribute(connection: Connection) -> list[str]:
    names = citus.distribute_tables(connection)
    citus.distribute_row_types(connection)
    citus.configure_workers(connection)
    return names
