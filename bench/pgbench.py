"""What PostgreSQL itself commits one at a time, as its own pgbench measures it."""

import re
from pathlib import Path

import asyncpg

from pointbook_cli.embedded_postgres.programs import find_binaries, run

SCRIPT = Path(__file__).with_name("upsert.sql")
CLIENTS = 16
ROWS = 100_000
RATE = re.compile(r"^tps = ([\d.]+)", re.MULTILINE)


async def prepare_upserts(connection: asyncpg.Connection) -> None:
    """Make the table in which pgbench changes one row at a time."""
    await connection.execute("CREATE TABLE bench_upserts (account integer PRIMARY KEY, balance bigint NOT NULL)")
    await connection.execute("INSERT INTO bench_upserts SELECT generate_series(1, $1::int), 0", ROWS)
    await connection.execute("VACUUM ANALYZE bench_upserts")


async def measure_upserts(database_url: str, seconds: float) -> float:
    """Answer how many upserts a second are committed; pgbench measures whole seconds, one at least."""
    printed = await run(
        str(find_binaries() / "pgbench"),
        "--no-vacuum",
        "--protocol=prepared",
        f"--client={CLIENTS}",
        f"--time={max(1, round(seconds))}",
        f"--define=rows={ROWS}",
        f"--file={SCRIPT}",
        database_url,
    )
    rate = RATE.search(printed)
    if rate is None:
        raise RuntimeError(f"pgbench told no rate: {printed}")
    return float(rate[1])
