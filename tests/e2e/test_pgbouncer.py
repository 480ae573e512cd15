"""A server whose database is behind a real PgBouncer, with the shipped settings."""

import configparser
import getpass
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db.database import PLANNED_ONCE, SESSION_SETTINGS
from support.database_proxy import proxied
from support.deploy_files import DEPLOY
from support.deployments import Deployment, error_lines
from support.processes import Running, clean_environment
from support.retrying_callers import RetryingCallers, check_acknowledged_events
from support.tokens import make_token
from support.verification import run_verify

CALLERS = 32
IGNORED = {name for name in SESSION_SETTINGS | PLANNED_ONCE if name != "application_name"}
"""The settings that PgBouncer does not pass on to the database."""
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")


def shipped() -> configparser.ConfigParser:
    """Return the shipped configuration."""
    config = configparser.ConfigParser()
    config.read(DEPLOY / "pgbouncer" / "pgbouncer.ini")
    return config


@asynccontextmanager
async def pgbouncer(database_url: str, folder: Path) -> AsyncIterator[str]:
    """Run PgBouncer during the block, and give the database's URL through it.

    Addresses and TLS are replaced, because the test's database listens on a Unix socket that only its owner may use.
    """
    assert PGBOUNCER is not None
    parts, config, port = urlsplit(database_url), shipped(), free_port()
    async with proxied(database_url) as proxy:
        database = urlsplit(proxy.url)
        config["databases"] = {
            "*": f"host=127.0.0.1 port={database.port} dbname={parts.path[1:]} user={database.username}"
        }
        for name in [name for name in config["pgbouncer"] if "_tls_" in name]:
            del config["pgbouncer"][name]
        config["pgbouncer"].update(
            {
                "listen_addr": "127.0.0.1",
                "listen_port": str(port),
                "unix_socket_dir": "",
                "auth_type": "any",
                # It refuses to run as root.
                "user": "nobody" if os.geteuid() == 0 else getpass.getuser(),
            }
        )
        path = folder / "pgbouncer.ini"
        with path.open("w") as file:
            config.write(file)
        process = await Running.start(PGBOUNCER, path, environment=clean_environment({}), folder=folder)
        try:
            await process.printed("process up")
            yield f"postgresql://{database.username}@127.0.0.1:{port}{parts.path}"
        finally:
            await process.kill()


def test_the_shipped_settings_are_those_of_the_server() -> None:
    ignored = shipped()["pgbouncer"]["ignore_startup_parameters"].split(", ")
    statements = (DEPLOY / "pgbouncer" / "role-settings.sql").read_text().splitlines()[1:]
    expected = {name: value for name, value in (SESSION_SETTINGS | PLANNED_ONCE).items() if name in IGNORED}

    assert set(ignored) == IGNORED
    assert statements == [
        f"ALTER ROLE pointbook IN DATABASE pointbook SET {name} = '{expected[name]}';" for name in sorted(expected)
    ]


@pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")
async def test_the_server_works_through_pgbouncer(database_url: str, tmp_path: Path) -> None:
    await give_role_its_settings(database_url)
    async with pgbouncer(database_url, tmp_path) as url:
        deployment = Deployment(tmp_path, url, await make_token(database_url, [ALL_MERCHANTS], list(Scope)))
        assert await session_settings(url) == await session_settings(database_url, **SESSION_SETTINGS, **PLANNED_ONCE)
        async with deployment.server() as server:
            client = await deployment.client()
            await client.close()
            callers = RetryingCallers(deployment.grpc_address, deployment.token, deployment.shop)
            callers.start(CALLERS)
            await callers.wait_for_acknowledged(10 * CALLERS)
            await callers.stop()
            assert error_lines(server.err) == []
        assert set(callers.codes) == {"OK"}
        await run_verify(url, deployment.shop.merchant_id)
    await check_acknowledged_events(database_url, deployment.shop, callers)


async def give_role_its_settings(database_url: str) -> None:
    """Run the shipped statements for the test's role and database."""
    parts = urlsplit(database_url)
    sql = (DEPLOY / "pgbouncer" / "role-settings.sql").read_text()
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        sql.replace("ROLE pointbook IN DATABASE pointbook", f'ROLE {parts.username} IN DATABASE "{parts.path[1:]}"')
    )
    await connection.close()


async def session_settings(url: str, **asked: str) -> dict[str, str]:
    """Return the settings of a new session that asks for some, without its name."""
    connection = await asyncpg.connect(url, server_settings=asked)
    settings = {name: await connection.fetchval("SELECT current_setting($1)", name) for name in sorted(IGNORED)}
    await connection.close()
    return settings
