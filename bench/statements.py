"""How many statements a call sends, as PostgreSQL itself counts them; with asyncpg each is one round trip."""

import asyncpg

from jobs import Job
from pointbook_cli.embedded_postgres import EmbeddedPostgres
from prepare import change_setting, connect
from processes import Load
from report import Result

COUNT = """
    SELECT sum(calls) FILTER (WHERE query !~ '^(BEGIN|COMMIT|ROLLBACK)') AS statements, sum(calls) AS round_trips
    FROM pg_stat_statements
"""


async def enable_counting(postgres: EmbeddedPostgres) -> None:
    """Start the database again with pg_stat_statements, which costs a little: so it is off while speed is measured."""
    await change_setting(postgres, "shared_preload_libraries", "pg_stat_statements")
    connection = await connect(postgres.url())
    await connection.execute("CREATE EXTENSION pg_stat_statements")
    await connection.close()


async def count_statements(name: str, job: Job, load: Load, connection: asyncpg.Connection) -> list[Result]:
    """Count the statements of a job's calls. What the server asks besides is a few statements a second."""
    await load.run(job)
    await connection.execute("SELECT pg_stat_statements_reset()")
    measurement = await load.run(job)
    counted = await connection.fetchrow(COUNT)
    shares = {"a call": measurement.calls}
    if job.updates > 1:
        shares["an update"] = measurement.calls * job.updates
    return [
        Result(f"{name}: {what}", float(counted[column]) / count, share)
        for share, count in shares.items()
        for what, column in (("statements", "statements"), ("round trips", "round_trips"))
    ]
