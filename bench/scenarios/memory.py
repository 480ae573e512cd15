"""The server's memory after many calls, and its change after as many again."""

from load.jobs import Job
from reporting.progress import StepProgress
from reporting.results import Result
from servers.process_usage import resident_megabytes
from servers.subprocesses import LoadProcess, ServerProcess


async def measure_memory(job: Job, server: ServerProcess, load: LoadProcess, steps: StepProgress) -> list[Result]:
    """Run a job twice on a new server, and measure memory after each."""
    resident = []
    for run in ("first", "next"):
        steps.begin(f"memory: the {run} {job.calls_max:,} calls")
        await load.run(job)
        resident.append(resident_megabytes(server.pid))
    before, after = resident
    change = 100 * (after - before) / before
    return [
        Result(f"server's resident memory after {job.calls_max:,} calls", before, "MB", "≤ 130 MB, aim 100 MB"),
        Result(f"server's resident memory: change over the next {job.calls_max:,} calls", change, "%", "± 2 %"),
    ]
