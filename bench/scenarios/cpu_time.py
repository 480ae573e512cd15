"""The CPU time that a call costs the server and PostgreSQL."""

from dataclasses import replace

import asyncpg

from load.jobs import Job
from reporting.results import Result
from servers.process_usage import cpu_seconds, parent_pid
from servers.subprocesses import LoadProcess, ServerProcess

CPU_SECONDS = 3.0
"""How long each kind of call is measured."""
WARM_UP_SECONDS = 0.5
"""How long it runs before, so that statements are prepared."""
MICROSECONDS = 1e6


async def measure_cpu_time(
    name: str, job: Job, server: ServerProcess, load: LoadProcess, connection: asyncpg.Connection
) -> list[Result]:
    """Measure the CPU time of a job's calls, or of each of their updates.

    It depends less on what else runs on the machine than a rate does.
    """
    await load.run(replace(job, seconds=WARM_UP_SECONDS))
    postmaster = parent_pid(await connection.fetchval("SELECT pg_backend_pid()"))
    processes = {"the server": server.pid, "PostgreSQL": postmaster}
    before = {label: cpu_seconds(pid) for label, pid in processes.items()}
    measurement = await load.run(job)
    count = measurement.calls * job.updates
    return [
        Result(f"{name}: CPU of {label}", (cpu_seconds(pid) - before[label]) / count * MICROSECONDS, "µs each")
        for label, pid in processes.items()
    ]
