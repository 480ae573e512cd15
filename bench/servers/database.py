"""The database of a run: its process, its content and its program."""

import secrets
from base64 import b64encode
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import asyncpg

from load.requests import PROGRAM_ID
from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.access.rules import new_token
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.clock import system_clock
from pointbook_server.db.database import Database
from pointbook_server.db.migrations import migrate
from pointbook_server.programs.model import Channel, Criteria, Program, ValidationSettings
from pointbook_server.programs.transactions import ProgramTransactions
from scenarios.populations import Population


@asynccontextmanager
async def run_postgres(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    """Run a PostgreSQL in a folder."""
    postgres = EmbeddedPostgres(folder)
    await postgres.start()
    try:
        yield postgres
    finally:
        await postgres.stop()


async def change_setting(postgres: EmbeddedPostgres, name: str, value: str) -> None:
    """Change a setting of PostgreSQL, and restart it."""
    connection = await connect(postgres.url())
    await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
    await connection.close()
    await postgres.stop()
    await postgres.start()


def server_environment(postgres: EmbeddedPostgres) -> dict[str, str]:
    """Return a server's settings, with practically no limit on codes per merchant."""
    code_key = b64encode(secrets.token_bytes(32)).decode()
    return {
        "POINTBOOK_DATABASE_URL": postgres.url(),
        "POINTBOOK_CODE_KEYS": f"bench:{code_key}",
        "POINTBOOK_MERCHANT_SENDS_MAX": "1000000000",
    }


async def prepare_database(database_url: str, populations: Collection[Population]) -> str:
    """Migrate a database, insert populations, and return a token for all of them."""
    await migrate(database_url)
    connection = await connect(database_url)
    for population in populations:
        await population.populate(connection)
    # A database in production has statistics; this one is new.
    await connection.execute("VACUUM ANALYZE")
    await connection.close()
    database = Database(database_url, pool_size=1)
    for population in populations:
        await _put_program(database, population)
    token, bearer = new_token("bench", [ALL_MERCHANTS], list(Scope), system_clock(), None)
    await TokenTransactions(database).create(token)
    await database.dispose()
    return bearer


async def connect(database_url: str) -> asyncpg.Connection:
    """Connect to a database, with a timeout for long statements."""
    return await asyncpg.connect(database_url, timeout=10, command_timeout=120)


async def _put_program(database: Database, population: Population) -> None:
    """Create a program for the population's first merchant.

    No code required, codes sent by SMS. Its criteria are those of `pointbook dev`'s sample.
    """
    account = population.ids(0)
    program = Program(
        merchant_id=account.merchant_id,
        program_id=PROGRAM_ID,
        store_ids=(account.store_id,),
        redemption_enabled=True,
        criteria=Criteria(multiples_of=10, max_points_per_redemption=200),
        point_value=Decimal("0.01"),
        currency_code="USD",
        validation=ValidationSettings(channels=(Channel.SMS,)),
    )
    await ProgramTransactions(database).put_program(program, None, system_clock())
