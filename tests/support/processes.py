"""Processes of `pointbook`, and of other programs, with a clean environment."""

import asyncio
import itertools
import os
import re
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, Self

from support.forked import FORKS, Child
from support.probes import children_of

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
POINTBOOK = BIN / "pointbook"
START_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 30.0
COMMAND_SECONDS_MAX = 60.0
HAS_PROC = Path("/proc/self/fd").exists()

_numbers = itertools.count(1)


def clean_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return an environment of paths and settings, which are given without POINTBOOK_."""
    paths = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return paths | {f"POINTBOOK_{name}": value for name, value in settings.items()}


@dataclass(frozen=True)
class Finished:
    """The exit code and the output of a command."""

    exit_code: int
    out: str
    err: str


async def finish(
    *command: str | Path, environment: dict[str, str], cwd: Path = ROOT, seconds: float = COMMAND_SECONDS_MAX
) -> Finished:
    """Run a command, and return its output.

    Kills it and raises TimeoutError after `seconds`.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=environment, cwd=cwd
    )
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    finally:
        await _end_by_force(process)
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())


async def pointbook(*arguments: str | Path, **settings: str) -> Finished:
    """Run a `pointbook` command as a fork, and return its output."""
    return await finish_fork(POINTBOOK, *arguments, settings=settings)


async def finish_fork(program: Path, *arguments: str | Path, settings: Mapping[str, str]) -> Finished:
    """Run the `pointbook` command of any release as a fork, and return its output."""
    with open_null() as null, TemporaryFile() as out, TemporaryFile() as err:
        process = await FORKS.start(
            (program, *arguments), environment=clean_environment(settings), cwd=ROOT, streams=(null, out, err)
        )
        try:
            async with asyncio.timeout(COMMAND_SECONDS_MAX):
                exit_code = await process.wait()
        finally:
            await _end_by_force(process)
        out.seek(0)
        err.seek(0)
        return Finished(exit_code, out.read().decode(), err.read().decode())


def without_request_ids(text: str) -> str:
    """Return what a command printed, with … for the ids of its calls."""
    return re.sub(r"\(request [0-9a-f]{32}\)", "(request …)", text)


def one_line(finished: Finished) -> str:
    """Return the only message of a command that failed with exit code 2."""
    assert finished.exit_code == 2, finished
    assert finished.out == "", finished
    assert finished.err.count("\n") == 1, finished.err
    assert finished.err.startswith("pointbook: "), finished.err
    return finished.err.removeprefix("pointbook: ").strip()


def _output(folder: Path, name: str, kind: str) -> BinaryIO:
    """Open an output file that only its owner may read."""
    return open(folder / f"{name}.{kind}", "wb", opener=lambda path, flags: os.open(path, flags, 0o600))


def open_null() -> BinaryIO:
    """Open an empty input."""
    return Path(os.devnull).open("rb")


class Running:
    """A running process. It writes to files, so that it never waits for a reader."""

    def __init__(self, process: Child, folder: Path, name: str) -> None:
        self.process = process
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"

    @classmethod
    async def start(cls, *command: str | Path, environment: dict[str, str], folder: Path, cwd: Path = ROOT) -> Self:
        """Start a command whose output goes to files in a folder."""
        name = f"process-{next(_numbers)}"
        with _output(folder, name, "out") as out, _output(folder, name, "err") as err:
            # With its own session, a signal to its group reaches only the command and its workers.
            process = await asyncio.create_subprocess_exec(
                *command, stdin=DEVNULL, stdout=out, stderr=err, env=environment, cwd=cwd, start_new_session=True
            )
        return cls(process, folder, name)

    @classmethod
    async def fork(
        cls,
        *arguments: str | Path,
        environment: dict[str, str],
        folder: Path,
        cwd: Path = ROOT,
        program: Path = POINTBOOK,
    ) -> Self:
        """Start a `pointbook` command as a fork whose output goes to files in a folder."""
        name = f"process-{next(_numbers)}"
        with open_null() as null, _output(folder, name, "out") as out, _output(folder, name, "err") as err:
            command, streams = (program, *arguments), (null, out, err)
            process = await FORKS.start(
                command, environment=environment, cwd=cwd, streams=streams, has_own_session=True
            )
        return cls(process, folder, name)

    @property
    def out(self) -> str:
        """The standard output so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """The standard error so far: the logs."""
        return self._err.read_text()

    def workers(self) -> list[int]:
        """Return the ids of the worker processes."""
        return children_of(self.process.pid)

    async def until(self, condition: Callable[[], Awaitable[bool]], seconds: float = START_SECONDS_MAX) -> None:
        """Wait until a condition holds. Fails after `seconds`, or if the process ends."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not await condition():
            assert self.process.returncode is None, f"ended with {self.process.returncode}: {self.err}"
            assert asyncio.get_running_loop().time() < deadline, f"not within {seconds} s: {self.err}"
            await asyncio.sleep(0.02)

    async def printed(self, text: str) -> None:
        """Wait until the output or the logs contain a text."""

        async def condition() -> bool:
            return text in self.out or text in self.err

        await self.until(condition)

    async def stop(self, order: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Signal the process group, as Ctrl-C does. Return the exit code and the seconds."""
        began = asyncio.get_running_loop().time()
        os.killpg(self.process.pid, order)
        return await self.wait(), asyncio.get_running_loop().time() - began

    async def terminate(self) -> tuple[int, float]:
        """Send SIGTERM to the process only, as a service manager does. Return as `stop`."""
        began = asyncio.get_running_loop().time()
        self.process.terminate()
        return await self.wait(), asyncio.get_running_loop().time() - began

    async def wait(self, seconds: float = STOP_SECONDS_MAX) -> int:
        """Wait for the end, and return the exit code."""
        async with asyncio.timeout(seconds):
            return await self.process.wait()

    async def kill(self) -> None:
        """Kill the process, as in a crash."""
        await _end_by_force(self.process)


@asynccontextmanager
async def running(
    *arguments: str | Path,
    folder: Path,
    settings: Mapping[str, str],
    cwd: Path = ROOT,
    is_fork: bool = True,
    program: Path = POINTBOOK,
) -> AsyncIterator[Running]:
    """Run a `pointbook` command during the block, then kill it.

    `program` is that of another release.
    Without `is_fork` the command starts an interpreter: for tests of the start, and of settings that libraries read
    while they are imported.
    """
    environment = clean_environment(settings)
    if is_fork:
        process = await Running.fork(*arguments, environment=environment, folder=folder, cwd=cwd, program=program)
    else:
        process = await Running.start(program, *arguments, environment=environment, folder=folder, cwd=cwd)
    try:
        yield process
    finally:
        await process.kill()


async def _end_by_force(process: Child) -> None:
    """Kill a process if it still runs."""
    if process.returncode is None:
        process.kill()
        await process.wait()
