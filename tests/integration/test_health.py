"""Health of a database's schema: tables, revision, and privileges of the role."""

import contextlib
import json
import os
import re
import signal
from collections.abc import AsyncIterator

import asyncpg
import pytest

from integration.test_plans import AUDIT, MODULES, statements_of
from pointbook_cli.services.database_checks import check_database
from pointbook_server.db import database_health as database_health_module
from pointbook_server.db.schema import needed_privileges
from pointbook_server.db.tables import metadata
from pointbook_server.server import Server
from support.connections import connected
from support.embedded_database import Cluster
from support.json_logs import json_logs
from support.probes import grpc_health
from support.servers import server_settings
from support.unique_names import unique
from support.waiting import until

OF_COMMANDS = {"INSERT_TOKEN"}
SERVER_STATEMENTS = [
    (name, statement.sql)
    for module in MODULES
    for name, statement in statements_of(module)
    if name not in OF_COMMANDS and not AUDIT.fullmatch(name)
]


@pytest.fixture
async def own_url(cluster: Cluster, database_url: str) -> str:  # noqa: ARG001 - creates the template
    """A migrated database for one test."""
    return await cluster.clone("pointbook_template")


@contextlib.asynccontextmanager
async def serving(url: str) -> AsyncIterator[str]:
    """Run a server on a database, and return its address."""
    server = Server(server_settings(), url, senders={})
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop()


async def until_health_is(address: str, status: str) -> None:
    """Wait until health has a status."""

    async def has() -> bool:
        return await grpc_health(address) == status

    await until(has)


async def role_url(operator: asyncpg.Connection, url: str, grants: str) -> tuple[str, str]:
    """Create a role that may log in; return its name and its URL."""
    role = unique("role").replace("-", "_")
    await operator.execute(f"CREATE ROLE {role} LOGIN {grants}")
    return role, url.replace("pointbook@", f"{role}@", 1)


@pytest.mark.parametrize("grants", ["", "IN ROLE pg_read_all_data", "IN ROLE pg_write_all_data"])
async def test_role_without_privileges_is_not_serving(own_url: str, grants: str) -> None:
    """Later grants take effect without a restart."""
    async with connected(own_url) as operator:
        role, url = await role_url(operator, own_url, grants)
        with json_logs(database_health_module) as written:
            async with serving(url) as address:
                assert await grpc_health(address) == "NOT_SERVING"
                await operator.execute(f"GRANT pg_read_all_data, pg_write_all_data TO {role}")
                await until_health_is(address, "SERVING")

    logged = [json.loads(line) for line in written.getvalue().splitlines()]
    outages = [line for line in logged if line["event"] == "the database cannot be used"]
    assert "points_accounts" in outages[0]["cause"]
    assert "the database can be used" in [line["event"] for line in logged if line["level"] == "info"]


async def test_role_without_one_privilege_is_not_serving(own_url: str) -> None:
    """The log names the table."""
    async with connected(own_url) as operator:
        role, url = await role_url(operator, own_url, "IN ROLE pg_read_all_data")
        await operator.execute(f"GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
        async with serving(url) as address:
            assert await grpc_health(address) == "SERVING"
            with json_logs(database_health_module) as written:
                await operator.execute(f"REVOKE UPDATE ON redemptions FROM {role}")
                await until_health_is(address, "NOT_SERVING")
            assert "redemptions" in written.getvalue()


@pytest.mark.parametrize(
    ("privilege", "table"),
    [("DELETE", "customer_identifiers"), ("DELETE", "points_checkpoints"), ("INSERT", "redemption_audit")],
)
async def test_each_privilege_that_statements_need_is_checked(own_url: str, privilege: str, table: str) -> None:
    async with connected(own_url) as operator:
        role, url = await role_url(operator, own_url, "IN ROLE pg_read_all_data")
        await operator.execute(f"GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
        await operator.execute(f"REVOKE {privilege} ON {table} FROM {role}")
        with json_logs(database_health_module) as written:
            async with serving(url) as address:
                assert await grpc_health(address) == "NOT_SERVING"
        assert table in written.getvalue()


async def test_missing_privileges_are_named_exactly(own_url: str) -> None:
    """A role of an earlier release lacks what later statements need."""
    async with connected(own_url) as operator:
        role, url = await role_url(operator, own_url, "IN ROLE pg_read_all_data, pg_write_all_data")
        await check_database(url)
        await operator.execute(f"REVOKE pg_write_all_data FROM {role}")
        await operator.execute(f"GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
        await operator.execute(f"REVOKE DELETE ON customer_audit, validation_audit FROM {role}")
        await operator.execute(f"REVOKE INSERT, UPDATE ON redemptions FROM {role}")
        with pytest.raises(OSError, match="grant it") as caught:
            await check_database(url)

    assert str(caught.value) == (
        "the role of POINTBOOK_DATABASE_URL lacks privileges: "
        "grant it DELETE on customer_audit, validation_audit; INSERT, UPDATE on redemptions"
    )


async def test_needed_privileges_are_exactly_those_that_statements_use(own_url: str) -> None:
    """PostgreSQL checks privileges when it plans a statement."""
    async with connected(own_url) as operator:
        role, url = await role_url(operator, own_url, "")
        for table in metadata.tables:
            await operator.execute(f"GRANT {', '.join(needed_privileges(table))} ON {table} TO {role}")
        async with connected(url) as server:

            async def denied(table: str = "") -> list[str]:
                return [name for name, sql in SERVER_STATEMENTS if table in sql and await _is_denied(server, sql)]

            assert await denied() == []
            unused = set()
            for table in metadata.tables:
                for privilege in set(needed_privileges(table)) - {"SELECT"}:
                    await operator.execute(f"REVOKE {privilege} ON {table} FROM {role}")
                    if not await denied(table):
                        unused.add((table, privilege))
                    await operator.execute(f"GRANT {privilege} ON {table} TO {role}")

    assert unused == set()


async def _is_denied(connection: asyncpg.Connection, sql: str) -> bool:
    """Return whether a role lacks a privilege for a statement."""
    await connection.execute(f"PREPARE planned AS {sql}")
    parameters = ", ".join(["NULL"] * len(set(re.findall(r"\$\d+", sql))))
    try:
        await connection.execute(f"EXPLAIN EXECUTE planned ({parameters})" if parameters else "EXPLAIN EXECUTE planned")
    except asyncpg.InsufficientPrivilegeError:
        return True
    finally:
        await connection.execute("DEALLOCATE planned")
    return False


async def test_read_only_database_is_not_serving(own_url: str) -> None:
    async with connected(own_url) as operator:
        name = await operator.fetchval("SELECT current_database()")
        await operator.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with json_logs(database_health_module) as written:
        async with serving(own_url) as address:
            assert await grpc_health(address) == "NOT_SERVING"

    assert "read-only" in written.getvalue()


async def test_hanging_database_is_not_serving(own_url: str) -> None:
    """It accepts statements that never end, as with a hanging disk."""
    async with serving(own_url) as address:
        assert await grpc_health(address) == "SERVING"
        async with connected(own_url) as operator:
            sessions = await operator.fetch(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        for session in sessions:
            os.kill(session["pid"], signal.SIGSTOP)
        try:
            await until_health_is(address, "NOT_SERVING")
            await until_health_is(address, "SERVING")  # on a new connection
        finally:
            for session in sessions:
                os.kill(session["pid"], signal.SIGCONT)


async def test_newer_revision_is_accepted(own_url: str) -> None:
    """The previous release may restart while its successor is rolled out."""
    async with connected(own_url) as operator:
        await operator.execute("UPDATE alembic_version SET version_num = '9999'")
        await check_database(own_url)
        await operator.execute("UPDATE alembic_version SET compatible_from = '0028'")
        await check_database(own_url)
        await operator.execute("UPDATE alembic_version SET version_num = '0001'")
        with pytest.raises(OSError, match="pointbook migrate"):
            await check_database(own_url)


async def test_newer_revision_that_took_something_away_is_refused(own_url: str) -> None:
    async with connected(own_url) as operator:
        await operator.execute("UPDATE alembic_version SET version_num = '9999', compatible_from = '9998'")
        with pytest.raises(OSError, match="releases before revision 9998 cannot use"):
            await check_database(own_url)


async def test_revision_is_checked_by_a_role_that_reads_only_the_numbers(own_url: str) -> None:
    """The promise of later releases needs no privilege of its own."""
    async with connected(own_url) as operator:
        role, url = await role_url(operator, own_url, "")
        for table in metadata.tables:
            await operator.execute(f"GRANT {', '.join(needed_privileges(table))} ON {table} TO {role}")
        await operator.execute(f"GRANT SELECT ON alembic_version TO {role}")
        await check_database(url)
        await operator.execute("ALTER TABLE alembic_version DROP COLUMN compatible_from")
        await check_database(url)


async def test_role_with_another_search_path_is_not_serving(own_url: str) -> None:
    async with connected(own_url) as operator:
        role, url = await role_url(operator, own_url, "IN ROLE pg_read_all_data, pg_write_all_data")
        await operator.execute(f"ALTER ROLE {role} SET search_path = elsewhere")
        with json_logs(database_health_module) as written:
            async with serving(url) as address:
                assert await grpc_health(address) == "NOT_SERVING"

    assert "search_path" in written.getvalue()


async def test_older_or_missing_revision_is_not_serving(own_url: str) -> None:
    async with connected(own_url) as operator, serving(own_url) as address:
        assert await grpc_health(address) == "SERVING"
        await operator.execute("UPDATE alembic_version SET version_num = '0001'")
        await until_health_is(address, "NOT_SERVING")
        await operator.execute("UPDATE alembic_version SET version_num = '9999'")
        await until_health_is(address, "SERVING")
        await operator.execute("DELETE FROM alembic_version")
        await until_health_is(address, "NOT_SERVING")
