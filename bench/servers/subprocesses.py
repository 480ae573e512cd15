"""The processes that a run starts, each stopped by its own handle."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from load.jobs import Job, Measurement

BENCH = Path(__file__).parents[1]
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0


@asynccontextmanager
async def run_python(*arguments: str, environment: Mapping[str, str]) -> AsyncIterator[Process]:
    """Run Python with arguments, and stop it by SIGTERM.

    The caller's POINTBOOK_* settings are removed from its environment.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("POINTBOOK_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=PIPE, stdout=PIPE, env={**inherited, "PYTHONPATH": str(BENCH), **environment}
    )
    try:
        yield process
    finally:
        await _stop(process)


@asynccontextmanager
async def run_server(name: str, environment: Mapping[str, str]) -> AsyncIterator["ServerProcess"]:
    """Run a server of `servers.process`."""
    async with run_python("-m", "servers.process", name, environment=environment) as process:
        yield ServerProcess(process, await read_line(process))


@asynccontextmanager
async def run_load_process() -> AsyncIterator["LoadProcess"]:
    """Run the load process."""
    async with run_python("-m", "load.process", environment={}) as process:
        await read_line(process)
        yield LoadProcess(process)


class ServerProcess:
    """A running server, and its address."""

    def __init__(self, process: Process, address: str) -> None:
        self._process = process
        self.address = address

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid


class LoadProcess:
    """The load process, which runs one job at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def run(self, job: Job) -> Measurement:
        """Run a job. Raises RuntimeError if a call had an unexpected result."""
        assert self._process.stdin is not None, "the process was started with a pipe"  # noqa: S101 - narrows
        self._process.stdin.write(json.dumps(job.to_json()).encode() + b"\n")
        line = await read_line(self._process, job.warm_up_seconds + job.seconds + START_SECONDS_MAX)
        return Measurement(**json.loads(line))


async def read_line(process: Process, seconds_max: float = START_SECONDS_MAX) -> str:
    """Read the next line that a process prints. Raises RuntimeError if it has ended."""
    assert process.stdout is not None, "the process was started with a pipe"  # noqa: S101 - narrows
    async with asyncio.timeout(seconds_max):
        line = await process.stdout.readline()
    if not line:
        raise RuntimeError("a process of the benchmark ended early; see its message above")
    return line.decode().strip()


async def _stop(process: Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS_MAX):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
