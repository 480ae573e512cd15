"""The migrations: their result equals tables.py, and they can run at any time."""

import asyncio
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection

from pointbook_server.db import migrations
from pointbook_server.db.database import SESSION_SETTINGS, create_engine
from pointbook_server.db.migrations import LOCK_KEY, MigrationError, migrate, read_stored_revision
from pointbook_server.db.migrations.revisions import Fit, all_revisions, fit
from pointbook_server.db.tables import metadata
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from support.connections import connected
from support.embedded_database import Cluster
from support.waiting import until

EMPTY = "pointbook_empty"
CONSTRAINTS = """
    SELECT conrelid::regclass::text AS "table", conname, pg_get_constraintdef(oid) AS definition
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
    ORDER BY 1, 2
"""
OTHER_TRANSACTIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'
"""
LATER_REVISION = "UPDATE alembic_version SET version_num = '9999', compatible_from = $1"
INDEXES = "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1, 2"
COLUMNS = """
    SELECT attrelid::regclass::text AS "table", attname, format_type(atttypid, atttypmod) AS type, attnotnull,
        pg_get_expr(adbin, adrelid) AS "default", col_description(attrelid, attnum) AS comment
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
    ORDER BY 1, attnum
"""
STORAGE = """
    SELECT relname, reloptions FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY 1
"""
TRIGGERS = """
    SELECT tgname FROM pg_trigger WHERE tgrelid = 'points_entries'::regclass AND NOT tgisinternal AND tgenabled = 'O'
    ORDER BY 1
"""


@pytest.fixture
async def empty_url(cluster: Cluster) -> str:
    """An empty database for one test."""

    async def leave_empty(_url: str) -> None:
        pass

    await cluster.template(EMPTY, leave_empty)
    return await cluster.clone(EMPTY)


async def catalogue(url: str, query: str) -> list[tuple[object, ...]]:
    """Return a catalogue query's rows, without Alembic's own table."""
    async with connected(url) as connection:
        return [tuple(row) for row in await connection.fetch(query) if row[0] != "alembic_version"]


def record_polls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that gets the result of each attempt to lock migrations."""
    polls: list[bool] = []
    try_lock = migrations._try_lock

    def record(connection: Connection) -> bool:
        polls.append(try_lock(connection))
        return polls[-1]

    monkeypatch.setattr(migrations, "_try_lock", record)
    return polls


async def fit_of(url: str) -> Fit:
    """Return how a database fits this release."""
    return fit(await read_stored_revision(url), all_revisions())


async def run_in_engine(url: str, work: Any) -> Any:
    """Run a function on a SQLAlchemy connection, and commit."""
    engine = create_engine(url)
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


async def test_autogenerate_finds_nothing_to_do(database_url: str) -> None:
    def differences(connection: Connection) -> Any:
        options = {"compare_type": True, "compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)

    assert await run_in_engine(database_url, differences) == []


@pytest.mark.parametrize("query", [CONSTRAINTS, INDEXES, COLUMNS, STORAGE])
async def test_migrated_database_equals_the_described_tables(database_url: str, empty_url: str, query: str) -> None:
    """Including names, definitions, comments and storage parameters."""
    await run_in_engine(empty_url, metadata.create_all)

    described = await catalogue(empty_url, query)

    assert described
    assert await catalogue(database_url, query) == described


async def test_every_constraint_is_named_in_tables(database_url: str) -> None:
    """Error handling relies on the names. NOT NULL constraints need none."""
    names = [str(name) for _, name, definition in await catalogue(database_url, CONSTRAINTS) if definition]
    declared = {str(constraint.name) for table in metadata.tables.values() for constraint in table.constraints}

    assert {name for name in names if not name.endswith("_not_null")} == declared


async def test_entry_triggers_exist(database_url: str) -> None:
    """The tables have no triggers, so the comparison does not cover them."""
    guards = [("points_entries_no_delete",), ("points_entries_no_truncate",), ("points_entries_no_update",)]

    assert await catalogue(database_url, TRIGGERS) == guards


async def test_migrating_twice_does_nothing_the_second_time(empty_url: str) -> None:
    """`pointbook migrate` may be part of every deployment."""
    first = await migrate(empty_url)
    before = await catalogue(empty_url, CONSTRAINTS)

    second = await migrate(empty_url)

    assert first[0] is None
    assert first[1] is not None
    assert second == (first[1], first[1])
    assert await catalogue(empty_url, CONSTRAINTS) == before


async def test_concurrent_migrations_wait_for_each_other(empty_url: str) -> None:
    results = await asyncio.gather(*(migrate(empty_url) for _ in range(3)))

    [newest] = {after for _, after in results}
    assert newest is not None
    assert sorted(str(before) for before, _ in results) == sorted(["None", newest, newest])


async def test_migration_waits_for_another_process(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No transaction stays open meanwhile: the build of an index would wait for it."""
    polls, reports = record_polls(monkeypatch), list[str]()
    async with connected(empty_url) as other:
        await other.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
        pid = await other.fetchval("SELECT pg_backend_pid()")
        migrating = asyncio.create_task(migrate(empty_url, report=reports.append))
        await until(lambda: len(polls) > 1)
        has_started = migrating.done() or await other.fetchval("SELECT to_regclass('stores') IS NOT NULL")
        open_transactions = await other.fetchval(OTHER_TRANSACTIONS)
        await other.execute("SELECT pg_advisory_unlock($1)", LOCK_KEY)
        await migrating

    assert reports == [f"waits for another migration of this database, process {pid} of PostgreSQL"]
    assert not has_started
    assert open_transactions == 0
    assert await fit_of(empty_url) is Fit.CURRENT


async def test_failed_migration_leaves_the_earlier_ones(empty_url: str) -> None:
    """Each has a transaction of its own; the next run continues."""
    async with connected(empty_url) as connection:
        await connection.execute("CREATE TABLE redemption_refusals (mine integer)")

    with pytest.raises(Exception, match="already exists"):
        await migrate(empty_url)

    assert (await read_stored_revision(empty_url)).number == "0019"
    async with connected(empty_url) as connection:
        assert await connection.fetchval("SELECT to_regtype('points_entry_row')") is None
        await connection.execute("DROP TABLE redemption_refusals")
    assert await migrate(empty_url) == ("0019", all_revisions()[-1].number)


async def test_database_is_older_until_migrated(empty_url: str) -> None:
    assert await fit_of(empty_url) is Fit.OLDER
    assert await catalogue(empty_url, CONSTRAINTS) == []

    await migrate(empty_url)

    assert await fit_of(empty_url) is Fit.CURRENT


@pytest.mark.parametrize("compatible_from", [None, "0002"])
async def test_database_of_a_later_release_stays_as_it_is(empty_url: str, compatible_from: str | None) -> None:
    """The previous release is deployed again, with its `pointbook migrate`."""
    await migrate(empty_url)
    async with connected(empty_url) as connection:
        await connection.execute(LATER_REVISION, compatible_from)

    assert await fit_of(empty_url) is Fit.NEWER
    assert await migrate(empty_url) == ("9999", "9999")
    assert (await read_stored_revision(empty_url)).compatible_from == compatible_from


async def test_database_that_a_later_release_contracted_is_refused(empty_url: str) -> None:
    await migrate(empty_url)
    async with connected(empty_url) as connection:
        await connection.execute(LATER_REVISION, "9998")

    assert await fit_of(empty_url) is Fit.INCOMPATIBLE
    with pytest.raises(MigrationError, match="releases before revision 9998 cannot use, and this one has"):
        await migrate(empty_url)


async def test_unavailable_database_raises(database_url: str) -> None:
    scheme, _, host = database_url.partition("?")
    unreachable = f"{scheme}?{host.replace('host=', 'host=/nowhere')}"

    for call in (migrate, read_stored_revision):
        with pytest.raises(PointbookError) as caught:
            await call(unreachable)
        assert caught.value.reason is Reason.DATABASE_UNAVAILABLE


async def test_waiting_migration_has_no_time_limit(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the time limits of calls nor that for the locks of tables apply."""
    for limit in ("lock_timeout", "statement_timeout"):
        monkeypatch.setitem(SESSION_SETTINGS, limit, "100ms")
    polls = record_polls(monkeypatch)
    monkeypatch.setattr(migrations, "POLL_SECONDS", 0.01)
    async with connected(empty_url) as holder:
        await holder.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
        waiting = asyncio.create_task(migrate(empty_url, lock_wait_seconds=0.0))
        await until(lambda: len(polls) > 20)
        assert not waiting.done()
    _, after = await waiting

    assert after is not None
