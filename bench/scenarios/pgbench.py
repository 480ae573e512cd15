"""The rate of single-row commits in PostgreSQL, measured by pgbench."""

import re
from pathlib import Path

import asyncpg

from pointbook_cli.embedded_postgres.binaries import find_binaries, run_program

SCRIPT = Path(__file__).with_name("upsert.sql")
CLIENTS = 16
ROWS = 100_000
RATE = re.compile(r"^tps = ([\d.]+)", re.MULTILINE)


async def create_upsert_table(connection: asyncpg.Connection) -> None:
    """Create the table in which pgbench changes one row per transaction."""
    await connection.execute("CREATE TABLE bench_upserts (account integer PRIMARY KEY, balance bigint NOT NULL)")
    await connection.execute("INSERT INTO bench_upserts SELECT generate_series(1, $1::int), 0", ROWS)
    await connection.execute("VACUUM ANALYZE bench_upserts")


async def measure_upserts(database_url: str, seconds: float) -> float:
    """Return the committed upserts per second.

    Pgbench runs for whole seconds, at least one.
    """
    output = await run_program(
        str(find_binaries() / "pgbench"),
        "--no-vacuum",
        "--protocol=prepared",
        f"--client={CLIENTS}",
        f"--time={max(1, round(seconds))}",
        f"--define=rows={ROWS}",
        f"--file={SCRIPT}",
        database_url,
    )
    rate = RATE.search(output)
    if rate is None:
        raise RuntimeError(f"pgbench printed no rate: {output}")
    return float(rate[1])
