"""Real `pointbook` processes for tests: started with a clean environment, watched, and ended by their own handles."""

import asyncio
import fcntl
import itertools
import os
import random
import shutil
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, Self

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.forked import FORKS, Child
from support.http_clients import http_client

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
POINTBOOK = BIN / "pointbook"
START_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 30.0
COMMAND_SECONDS_MAX = 60.0
HAS_PROC = Path("/proc/self/fd").exists()
# Below the ports that systems give out by themselves, so that no client's own port ever stands in the way.
PORTS = range(20_000, 30_000)

_numbers = itertools.count(1)


def clean_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Make an environment of nothing but the paths and the settings, each without its POINTBOOK_ prefix."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return kept | {f"POINTBOOK_{name}": value for name, value in settings.items()}


def free_port() -> int:
    """Find a port on which nothing listens; a restarted process can have it again."""
    while True:
        port = random.choice(PORTS)  # noqa: S311 - it need not be a secret
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@dataclass(frozen=True)
class Finished:
    """A command that has ended: what it printed, and its exit code."""

    exit_code: int
    out: str
    err: str


async def finish(
    *command: str | Path, environment: dict[str, str], cwd: Path = ROOT, seconds: float = COMMAND_SECONDS_MAX
) -> Finished:
    """Run a command to its end; one that takes longer than it may is killed, and the test fails."""
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
    """Run a `pointbook` command to its end, as a fork."""
    with open_null() as null, TemporaryFile() as out, TemporaryFile() as err:
        process = await FORKS.start(
            (POINTBOOK, *arguments), environment=clean_environment(settings), cwd=ROOT, streams=(null, out, err)
        )
        try:
            async with asyncio.timeout(COMMAND_SECONDS_MAX):
                exit_code = await process.wait()
        finally:
            await _end_by_force(process)
        out.seek(0)
        err.seek(0)
        return Finished(exit_code, out.read().decode(), err.read().decode())


def one_line(finished: Finished) -> str:
    """Return the one line with which a command was refused: exit code 2, nothing else printed, and no traceback."""
    assert finished.exit_code == 2, finished
    assert finished.out == "", finished
    assert finished.err.count("\n") == 1, finished.err
    assert finished.err.startswith("pointbook: "), finished.err
    return finished.err.removeprefix("pointbook: ").strip()


def _output(folder: Path, name: str, kind: str) -> BinaryIO:
    """Open a file that only its owner may read."""
    return open(folder / f"{name}.{kind}", "wb", opener=lambda path, flags: os.open(path, flags, 0o600))


def open_null() -> BinaryIO:
    """Open an input that is empty."""
    return Path(os.devnull).open("rb")


class Running:
    """A process that serves. Its output goes to files, so that it never waits for a reader."""

    def __init__(self, process: Child, folder: Path, name: str) -> None:
        self.process = process
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"

    @classmethod
    async def start(cls, *command: str | Path, environment: dict[str, str], folder: Path, cwd: Path = ROOT) -> Self:
        """Start a command whose output is kept in a folder."""
        name = f"process-{next(_numbers)}"
        with _output(folder, name, "out") as out, _output(folder, name, "err") as err:
            # A session of its own, as in a terminal: a signal to its group meets the command and its workers alone.
            process = await asyncio.create_subprocess_exec(
                *command, stdin=DEVNULL, stdout=out, stderr=err, env=environment, cwd=cwd, start_new_session=True
            )
        return cls(process, folder, name)

    @classmethod
    async def fork(cls, *arguments: str | Path, environment: dict[str, str], folder: Path, cwd: Path = ROOT) -> Self:
        """Start a `pointbook` command as a fork whose output is kept in a folder."""
        name = f"process-{next(_numbers)}"
        with open_null() as null, _output(folder, name, "out") as out, _output(folder, name, "err") as err:
            command, streams = (POINTBOOK, *arguments), (null, out, err)
            process = await FORKS.start(
                command, environment=environment, cwd=cwd, streams=streams, has_own_session=True
            )
        return cls(process, folder, name)

    @property
    def out(self) -> str:
        """What it has printed."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it has logged."""
        return self._err.read_text()

    def workers(self) -> list[int]:
        """Return the ids of its worker processes."""
        return children_of(self.process.pid)

    async def until(self, condition: Callable[[], Awaitable[bool]], seconds: float = START_SECONDS_MAX) -> None:
        """Wait until a condition holds while the process lives."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not await condition():
            assert self.process.returncode is None, f"ended with {self.process.returncode}: {self.err}"
            assert asyncio.get_running_loop().time() < deadline, f"not within {seconds} s: {self.err}"
            await asyncio.sleep(0.02)

    async def printed(self, text: str) -> None:
        """Wait until it has printed or logged a text."""

        async def condition() -> bool:
            return text in self.out or text in self.err

        await self.until(condition)

    async def stop(self, order: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """End it by a signal to its whole group, as Ctrl-C does; answers its exit code and how long it took."""
        began = asyncio.get_running_loop().time()
        os.killpg(self.process.pid, order)
        return await self.wait(), asyncio.get_running_loop().time() - began

    async def terminate(self) -> tuple[int, float]:
        """End it as a service manager does, by SIGTERM to the process itself; answers as `stop` does."""
        began = asyncio.get_running_loop().time()
        self.process.terminate()
        return await self.wait(), asyncio.get_running_loop().time() - began

    async def wait(self, seconds: float = STOP_SECONDS_MAX) -> int:
        """Wait for its end; answers the exit code."""
        async with asyncio.timeout(seconds):
            return await self.process.wait()

    async def kill(self) -> None:
        """End it at once, as a crash does."""
        await _end_by_force(self.process)


@asynccontextmanager
async def running(
    *arguments: str | Path, folder: Path, settings: Mapping[str, str], cwd: Path = ROOT, is_fork: bool = True
) -> AsyncIterator[Running]:
    """Run a serving `pointbook` command while the block runs; a test that wants a clean end asks for it itself.

    A command that is not a fork is a program with an interpreter of its own: for tests of how it starts and what the
    libraries read while they are imported.
    """
    environment = clean_environment(settings)
    if is_fork:
        process = await Running.fork(*arguments, environment=environment, folder=folder, cwd=cwd)
    else:
        process = await Running.start(POINTBOOK, *arguments, environment=environment, folder=folder, cwd=cwd)
    try:
        yield process
    finally:
        await process.kill()


async def _end_by_force(process: Child) -> None:
    """Kill a process and its group; one that has ended already has nothing left to kill."""
    if process.returncode is None:
        process.kill()
        await process.wait()


# Asking


async def grpc_health(address: str, seconds: float = 2.0) -> str:
    """Ask a gRPC server how it is: SERVING, NOT_SERVING, or the code of the error."""
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def http_get(url: str) -> int:
    """Ask an HTTP server; answers its status, or 0 where none listens."""
    async with http_client(timeout=5.0) as client:
        try:
            return (await client.get(url)).status_code
        except httpx.TransportError:
            return 0


def handles_sigterm(pid: int) -> bool:
    """Return whether a process has a handler for SIGTERM, which Python by itself does not: its event loop runs."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    return _state(pid) not in {"", "Z"}


def zombies(pids: Iterable[int]) -> list[int]:
    """Return those processes that have ended and whose parent has not noticed."""
    return [pid for pid in pids if _state(pid) == "Z"]


def children_of(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started, zombies included, the oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


# The embedded database


def database_is_stopped(data_dir: Path) -> bool:
    """Tell whether no process of the embedded database lives: each of them holds the lock of its folder."""
    try:
        lock = os.open(data_dir / "postgres" / "server.lock", os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


# Clients that are programs


def find_grpcurl() -> str | None:
    """Find grpcurl on the path, or where Go installs programs."""
    return shutil.which("grpcurl", path=_path_with_go())


def shell_environment() -> dict[str, str]:
    """Make the environment of a developer's terminal, in which grpcurl is found."""
    return clean_environment({}) | {"PATH": _path_with_go()}


def _path_with_go() -> str:
    folders = [os.environ.get("GOBIN"), *(f"{path}/bin" for path in os.environ.get("GOPATH", "").split(":") if path)]
    return os.pathsep.join([os.environ["PATH"], *filter(None, folders), str(Path.home() / "go" / "bin")])
