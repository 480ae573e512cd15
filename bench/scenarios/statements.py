"""The statements per call, as counted by PostgreSQL.

With asyncpg each is one round trip.
"""

import asyncpg

from load.jobs import Job
from pointbook_cli.embedded_postgres import EmbeddedPostgres
from reporting.results import Result
from servers.database import change_setting, connect
from servers.subprocesses import LoadProcess

SELECT_COUNTS = """
    SELECT sum(calls) FILTER (WHERE query !~ '^(BEGIN|COMMIT|ROLLBACK)') AS statements, sum(calls) AS round_trips
    FROM pg_stat_statements
"""


async def enable_statement_counts(postgres: EmbeddedPostgres) -> None:
    """Restart the database with pg_stat_statements.

    It is off while speed is measured.
    """
    await change_setting(postgres, "shared_preload_libraries", "pg_stat_statements")
    connection = await connect(postgres.url())
    await connection.execute("CREATE EXTENSION pg_stat_statements")
    await connection.close()


async def count_statements(name: str, job: Job, load: LoadProcess, connection: asyncpg.Connection) -> list[Result]:
    """Count the statements of a job's calls.

    Background work of the server adds a few per second.
    """
    await load.run(job)
    await connection.execute("SELECT pg_stat_statements_reset()")
    measurement = await load.run(job)
    counted = await connection.fetchrow(SELECT_COUNTS)
    units = {"a call": measurement.calls}
    if job.updates > 1:
        units["an update"] = measurement.calls * job.updates
    return [
        Result(f"{name}: {label}", float(counted[column]) / count, unit)
        for unit, count in units.items()
        for label, column in (("statements", "statements"), ("round trips", "round_trips"))
    ]
