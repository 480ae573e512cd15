"""`make bench`: measures Pointbook beside an echo on the same machine, prints a table and writes results.json.

Every speed is a ratio to something that was measured in the same run, on a durable database. No ratio fails the run.
"""

import argparse
import secrets
import tempfile
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop

from calls import SECRET
from development import measure_development
from jobs import Job, Kind
from pointbook_cli.embedded_postgres import EmbeddedPostgres
from prepare import connect, prepare
from processes import Load, loading, serving
from report import Result, Steps, print_table, write_json
from shops import Shops, shops_of
from speed import APPLY, ROUNDS, VALIDATE, Speed, rows
from statements import count_statements, enable_counting

ACCOUNTS = 100_000
SECONDS = 12.0
CODES_PER_SECOND_MAX = 5_000
COUNTED = {Kind.APPLY: APPLY, Kind.VALIDATE: VALIDATE}
COUNTED_CALLS = 1_000
COUNTED_IN_FLIGHT = 16
COUNTED_SECONDS_MAX = 30.0
BENCH = Path(__file__).parent
BUILD = BENCH.parent / "build"


@dataclass(frozen=True, slots=True)
class Stage:
    """What all parts of a run share."""

    postgres: EmbeddedPostgres
    load: Load
    token: str
    shops: Shops
    steps: Steps


async def main(*, accounts: int, seconds: float) -> None:
    """Measure everything, and end all that was started."""
    shops = shops_of(accounts=accounts, customers=int((seconds + ROUNDS) * CODES_PER_SECOND_MAX))
    BUILD.mkdir(exist_ok=True)
    steps = Steps(total=ROUNDS * (len(rows(shops)) + 1) + 5)
    with steps, tempfile.TemporaryDirectory(prefix="bench-", dir=BUILD) as name:
        folder = Path(name)
        async with _database(folder / "postgres") as postgres, loading() as load:
            steps.begin(f"filling the database with {accounts:,} accounts, twice")
            token = await prepare(postgres.url(), shops.stored)
            stage = Stage(postgres, load, token, shops, steps)
            results = [*await _measure_speed(stage, seconds), *await _count_statements(stage)]
        results += await measure_development(folder / "dev", steps)
    print_table(results)
    write_json(results, BENCH / "results.json")


async def _measure_speed(stage: Stage, seconds: float) -> list[Result]:
    """Measure all speeds with every server running, and then how much memory the real one has."""
    environment = _server_environment(stage.postgres)
    async with (
        serving("echo", {}) as echo,
        serving("plain", environment) as plain,
        serving("pointbook", environment) as pointbook,
        serving("shim", _shim_environment(pointbook.address, stage.token)) as shim,
    ):
        addresses = {"echo": echo.address, "plain": plain.address, "pointbook": pointbook.address, "shim": shim.address}
        speed = Speed(stage.load, stage.token, addresses)
        connection = await connect(stage.postgres.url())
        results = await speed.measure(stage.shops, seconds, connection, stage.steps)
        await connection.close()
        memory = Result("server's resident memory after all this", pointbook.resident_megabytes(), "MB", "≤ 150 MB")
    return [*results, memory]


async def _count_statements(stage: Stage) -> list[Result]:
    """Count statements on the same database, with the counting on and a fresh server."""
    await enable_counting(stage.postgres)
    connection = await connect(stage.postgres.url())
    results = []
    async with serving("pointbook", _server_environment(stage.postgres)) as server:
        for kind, name in COUNTED.items():
            stage.steps.begin(f"{name}: counting statements")
            job = Job(
                kind=kind,
                address=server.address,
                token=stage.token,
                population=stage.shops.book,
                in_flight=COUNTED_IN_FLIGHT,
                seconds=COUNTED_SECONDS_MAX,
                warm_up_seconds=0,
                calls_max=COUNTED_CALLS,
            )
            results += await count_statements(name, job, stage.load, connection)
    await connection.close()
    return results


@asynccontextmanager
async def _database(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    postgres = EmbeddedPostgres(folder)
    await postgres.start()
    try:
        yield postgres
    finally:
        await postgres.stop()


def _server_environment(postgres: EmbeddedPostgres) -> dict[str, str]:
    code_key = b64encode(secrets.token_bytes(32)).decode()
    return {"POINTBOOK_DATABASE_URL": postgres.url(), "POINTBOOK_CODE_KEYS": f"bench:{code_key}"}


def _shim_environment(grpc_address: str, token: str) -> dict[str, str]:
    return {
        "POINTBOOK_GRPC_ADDRESS": grpc_address,
        "POINTBOOK_TOKEN": token,
        "POINTBOOK_SHOPLINE_SECRETS": SECRET,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure Pointbook.")
    parser.add_argument("--accounts", type=int, default=ACCOUNTS, help=f"accounts to fill in ({ACCOUNTS:,})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"seconds to measure a row ({SECONDS:g})")
    options = parser.parse_args()
    uvloop.run(main(accounts=options.accounts, seconds=options.seconds))
