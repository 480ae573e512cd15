"""How much memory the server has after very many calls, and whether as many again change it."""

from jobs import Job
from processes import Load, Served
from report import Result, Steps
from usage import resident_megabytes


async def measure_memory(job: Job, server: Served, load: Load, steps: Steps) -> list[Result]:
    """Have a job of so many calls done twice on a fresh server."""
    resident = []
    for turn in ("first", "next"):
        steps.begin(f"memory: the {turn} {job.calls_max:,} calls")
        await load.run(job)
        resident.append(resident_megabytes(server.pid))
    before, after = resident
    change = 100 * (after - before) / before
    return [
        Result(f"server's resident memory after {job.calls_max:,} calls", before, "MB", "≤ 150 MB, aim 100 MB"),
        Result(f"server's resident memory: change over the next {job.calls_max:,} calls", change, "%", "± 5 %"),
    ]
