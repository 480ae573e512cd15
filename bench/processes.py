"""The processes that a run starts, each ended by its own handle whatever happens."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from jobs import Job, Measurement

BENCH = Path(__file__).parent
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0


@asynccontextmanager
async def started(*arguments: str, environment: Mapping[str, str]) -> AsyncIterator[Process]:
    """Run Python with arguments; SIGTERM ends it. Our caller's own POINTBOOK_* settings do not reach it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("POINTBOOK_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=PIPE, stdout=PIPE, env={**inherited, **environment}
    )
    try:
        yield process
    finally:
        await _end(process)


@asynccontextmanager
async def serving(name: str, environment: Mapping[str, str]) -> AsyncIterator["Served"]:
    """Run a server of servers.py until it is no longer needed."""
    async with started(str(BENCH / "servers.py"), name, environment=environment) as process:
        yield Served(process, await read_line(process))


@asynccontextmanager
async def loading() -> AsyncIterator["Load"]:
    """Run the load process."""
    async with started(str(BENCH / "load.py"), environment={}) as process:
        await read_line(process)
        yield Load(process)


class Served:
    """A server that runs, and the address at which it serves."""

    def __init__(self, process: Process, address: str) -> None:
        self._process = process
        self.address = address

    @property
    def pid(self) -> int:
        """The id under which the system counts what the server takes."""
        return self._process.pid


class Load:
    """The load process, which does one job at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def run(self, job: Job) -> Measurement:
        """Have a job done. Raises RuntimeError where a call was not answered as it should be."""
        assert self._process.stdin is not None, "the process was started with a pipe"  # noqa: S101 - narrows
        self._process.stdin.write(json.dumps(job.to_json()).encode() + b"\n")
        answer = await read_line(self._process, job.warm_up_seconds + job.seconds + START_SECONDS_MAX)
        return Measurement(**json.loads(answer))


async def read_line(process: Process, seconds_max: float = START_SECONDS_MAX) -> str:
    """Read the next line that a process prints. Raises RuntimeError when it ends instead: its log tells why."""
    assert process.stdout is not None, "the process was started with a pipe"  # noqa: S101 - narrows
    async with asyncio.timeout(seconds_max):
        line = await process.stdout.readline()
    if not line:
        raise RuntimeError("a process of the benchmark ended early; its message stands above")
    return line.decode().strip()


async def _end(process: Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS_MAX):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
