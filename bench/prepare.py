"""What a run needs in its database before it can measure."""

import secrets
from base64 import b64encode
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import asyncpg

from calls import PROGRAM_ID
from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.access.rules import new_token
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.clock import system_clock
from pointbook_server.db.database import Database
from pointbook_server.db.migrations import migrate
from pointbook_server.programs.model import Channel, Criteria, Program, ValidationSettings
from pointbook_server.programs.transactions import ProgramTransactions
from shops import Population


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    """Run a database of our own in a folder."""
    postgres = EmbeddedPostgres(folder)
    await postgres.start()
    try:
        yield postgres
    finally:
        await postgres.stop()


async def change_setting(postgres: EmbeddedPostgres, name: str, value: str) -> None:
    """Change a setting of a database that it reads at its start."""
    connection = await connect(postgres.url())
    await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
    await connection.close()
    await postgres.stop()
    await postgres.start()


def server_environment(postgres: EmbeddedPostgres) -> dict[str, str]:
    """Write the settings of a server on a database, whose one merchant sends more codes than anybody should."""
    code_key = b64encode(secrets.token_bytes(32)).decode()
    return {
        "POINTBOOK_DATABASE_URL": postgres.url(),
        "POINTBOOK_CODE_KEYS": f"bench:{code_key}",
        "POINTBOOK_MERCHANT_SENDS_MAX": "1000000000",
    }


async def prepare(database_url: str, populations: Collection[Population]) -> str:
    """Migrate a database, fill it with populations, and answer a token for all of them."""
    await migrate(database_url)
    connection = await connect(database_url)
    for population in populations:
        await population.seed(connection)
    # A database that has grown over months has statistics; this one has grown within seconds.
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
    """Connect to a database, for statements that take their time."""
    return await asyncpg.connect(database_url, timeout=10, command_timeout=120)


async def _put_program(database: Database, population: Population) -> None:
    """Put the seed's sample program for the population's first merchant: no code is asked for, and SMS are sent."""
    shop = population.ids(0)
    program = Program(
        merchant_id=shop.merchant_id,
        program_id=PROGRAM_ID,
        store_ids=(shop.store_id,),
        redemption_enabled=True,
        criteria=Criteria(multiples_of=10, max_points_per_redemption=200),
        point_value=Decimal("0.01"),
        currency_code="USD",
        validation=ValidationSettings(channels=(Channel.SMS,)),
    )
    await ProgramTransactions(database).put_program(program, None, system_clock())
