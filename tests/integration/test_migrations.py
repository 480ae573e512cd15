"""The migrations: their result equals tables.py, and they can run at any time."""

import asyncio
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection

from pointbook_server.db.database import SESSION_SETTINGS, create_engine
from pointbook_server.db.migrations import LOCK_KEY, is_pending, migrate
from pointbook_server.db.tables import metadata
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from support.connections import connected
from support.embedded_database import Cluster
from support.waiting import until, until_locks_are_awaited

EMPTY = "pointbook_empty"
CONSTRAINTS = """
    SELECT conrelid::regclass::text AS "table", conname, pg_get_constraintdef(oid) AS definition
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
    ORDER BY 1, 2
"""
WAITED_LONG = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock'
        AND query_start < clock_timestamp() - interval '0.5 s'
"""
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


async def test_migration_waits_for_another_process(empty_url: str) -> None:
    async with connected(empty_url) as other:
        await other.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
        migrating = asyncio.create_task(migrate(empty_url))
        await until_locks_are_awaited(empty_url)
        has_started = migrating.done() or await other.fetchval("SELECT to_regclass('stores') IS NOT NULL")
        await other.execute("SELECT pg_advisory_unlock($1)", LOCK_KEY)
        await migrating

    assert not has_started
    assert not await is_pending(empty_url)


async def test_failed_migration_leaves_nothing(empty_url: str) -> None:
    """All migrations run in one transaction."""
    async with connected(empty_url) as connection:
        await connection.execute("CREATE TABLE validation_challenges (mine integer)")

    with pytest.raises(Exception, match="already exists"):
        await migrate(empty_url)

    async with connected(empty_url) as connection:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert [row["tablename"] for row in tables] == ["validation_challenges"]
    assert await is_pending(empty_url)


async def test_database_is_pending_until_migrated(empty_url: str) -> None:
    assert await is_pending(empty_url)
    assert await catalogue(empty_url, CONSTRAINTS) == []

    await migrate(empty_url)

    assert not await is_pending(empty_url)


async def test_another_revision_is_pending(empty_url: str) -> None:
    await migrate(empty_url)
    async with connected(empty_url) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = '0000'")

    assert await is_pending(empty_url)


async def test_unavailable_database_raises(database_url: str) -> None:
    scheme, _, host = database_url.partition("?")
    unreachable = f"{scheme}?{host.replace('host=', 'host=/nowhere')}"

    for call in (migrate, is_pending):
        with pytest.raises(PointbookError) as caught:
            await call(unreachable)
        assert caught.value.reason is Reason.DATABASE_UNAVAILABLE


async def test_waiting_migration_has_no_time_limit(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limits of calls (lock_timeout, statement_timeout) do not apply."""
    for limit in ("lock_timeout", "statement_timeout"):
        monkeypatch.setitem(SESSION_SETTINGS, limit, "100ms")
    async with connected(empty_url) as holder:
        await holder.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
        waiting = asyncio.create_task(migrate(empty_url))

        async def has_waited_long() -> bool:
            return bool(await holder.fetchval(WAITED_LONG))

        await until(has_waited_long)
        assert not waiting.done()
    _, after = await waiting

    assert after is not None
