"""Health is true to the database: its tables, their revision, and what its role may do with them."""

import contextlib
import json
from collections.abc import AsyncIterator

import asyncpg
import pytest

from e2e.processes import grpc_health
from embedded_database import Cluster
from harness import server_settings, unique
from json_logs import json_logs
from pointbook_server import server as server_module
from pointbook_server.server import Server
from waiting import until


@pytest.fixture
async def own_url(cluster: Cluster, database_url: str) -> str:  # noqa: ARG001 - it makes the template
    """A migrated database for one test alone."""
    return await cluster.clone("pointbook_template")


@contextlib.asynccontextmanager
async def operator_of(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that may do everything."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def serving(url: str) -> AsyncIterator[str]:
    """Run a server on a database; answers its address."""
    server = Server(server_settings(), url, senders={})
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop()


async def becomes(address: str, status: str) -> None:
    """Wait until health has a status."""

    async def has() -> bool:
        return await grpc_health(address) == status

    await until(has)


async def role_url(operator: asyncpg.Connection, url: str, grants: str) -> tuple[str, str]:
    """Make a role that may log in; answers its name and the URL with it."""
    role = unique("role").replace("-", "_")
    await operator.execute(f"CREATE ROLE {role} LOGIN {grants}")
    return role, url.replace("pointbook@", f"{role}@", 1)


@pytest.mark.parametrize("grants", ["", "IN ROLE pg_read_all_data", "IN ROLE pg_write_all_data"])
async def test_a_role_that_may_not_use_the_tables_is_not_served_from(own_url: str, grants: str) -> None:
    """Reading alone is not enough, and what is granted later counts without a restart."""
    async with operator_of(own_url) as operator:
        role, url = await role_url(operator, own_url, grants)
        with json_logs(server_module) as written:
            async with serving(url) as address:
                assert await grpc_health(address) == "NOT_SERVING"
                await operator.execute(f"GRANT pg_read_all_data, pg_write_all_data TO {role}")
                await becomes(address, "SERVING")

    logged = [json.loads(line) for line in written.getvalue().splitlines()]
    (outage,) = [line for line in logged if line["level"] == "error"]
    assert "points_accounts" in outage["cause"]
    assert [line["event"] for line in logged if line["level"] == "info"][-1] == "the database answers"


async def test_a_role_without_one_privilege_is_not_served_from(own_url: str) -> None:
    """A single table that cannot be written stops what needs it, so that health names it."""
    async with operator_of(own_url) as operator:
        role, url = await role_url(operator, own_url, "IN ROLE pg_read_all_data")
        await operator.execute(f"GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
        async with serving(url) as address:
            assert await grpc_health(address) == "SERVING"
            with json_logs(server_module) as written:
                await operator.execute(f"REVOKE UPDATE ON redemptions FROM {role}")
                await becomes(address, "NOT_SERVING")
            assert "redemptions" in written.getvalue()


async def test_a_role_that_looks_into_another_schema_is_not_served_from(own_url: str) -> None:
    """The tables are there, and the role's search_path is not theirs."""
    async with operator_of(own_url) as operator:
        role, url = await role_url(operator, own_url, "IN ROLE pg_read_all_data, pg_write_all_data")
        await operator.execute(f"ALTER ROLE {role} SET search_path = elsewhere")
        with json_logs(server_module) as written:
            async with serving(url) as address:
                assert await grpc_health(address) == "NOT_SERVING"

    assert "search_path" in written.getvalue()


async def test_an_older_revision_is_not_served_from(own_url: str) -> None:
    """A newer one is: it is there while a release is rolled out, and the release before it goes on."""
    async with operator_of(own_url) as operator, serving(own_url) as address:
        assert await grpc_health(address) == "SERVING"
        await operator.execute("UPDATE alembic_version SET version_num = '0001'")
        await becomes(address, "NOT_SERVING")
        await operator.execute("UPDATE alembic_version SET version_num = '9999'")
        await becomes(address, "SERVING")
        await operator.execute("DELETE FROM alembic_version")
        await becomes(address, "NOT_SERVING")
