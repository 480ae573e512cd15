"""Commands as forks of a fork server, one for each process of a test run."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import IO, Protocol

from support.fork_server import LENGTH

_INHERITED = ("PATH", "HOME", "TMPDIR")
_ENVIRONMENT = {name: os.environ[name] for name in _INHERITED if name in os.environ} | {"GRPC_VERBOSITY": "NONE"}
"""The variables that libraries read on import. `pointbook` sets the verbosity of gRPC itself."""


class Child(Protocol):
    """A child process: one of asyncio, or a fork."""

    @property
    def pid(self) -> int:
        """The process id."""

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    async def wait(self) -> int:
        """Wait for the end, and return the exit code."""

    def send_signal(self, signal: int) -> None:
        """Send a signal."""

    def terminate(self) -> None:
        """Send SIGTERM."""

    def kill(self) -> None:
        """Send SIGKILL."""


class ForkedProcess:
    """A fork, whose parent is the fork server, which reports its end."""

    def __init__(self, pid: int, ended: asyncio.Task[int]) -> None:
        self.pid = pid
        self._ended = ended

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        """Wait for the end, and return the exit code."""
        return await asyncio.shield(self._ended)

    def send_signal(self, signal: int) -> None:
        """Send a signal unless the process has ended.

        Its end may not be reported yet.
        """
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A fork server that starts with the first command."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def start(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        cwd: Path,
        streams: tuple[int | IO[bytes], int | IO[bytes], int | IO[bytes]],
        has_own_session: bool = False,
    ) -> ForkedProcess:
        """Start a Python script with arguments, and with three streams."""
        request = json.dumps(
            {
                "command": [str(word) for word in command],
                "environment": dict(environment),
                "cwd": str(cwd),
                "has_own_session": has_own_session,
            }
        ).encode()
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = [*(each if isinstance(each, int) else each.fileno() for each in streams), theirs.fileno()]
            control = self._connect()
            socket.send_fds(control, [LENGTH.pack(len(request))], descriptors)
            control.sendall(request)
        reply, writer = await asyncio.open_connection(sock=ours)
        pid = int(await reply.readline())

        async def read_exit_code() -> int:
            try:
                return int(await reply.readline())
            finally:
                writer.close()

        return ForkedProcess(pid, asyncio.create_task(read_exit_code()))

    def stop(self) -> None:
        """Stop the server. Its forks go on."""
        if self._process is not None and self._control is not None:
            self._control.close()
            self._process.wait()
            self._process = self._control = None

    def _connect(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    (sys.executable, "-P", Path(__file__).with_name("fork_server.py"), str(theirs.fileno())),
                    stdin=DEVNULL,
                    env=_ENVIRONMENT,
                    pass_fds=(theirs.fileno(),),
                )
        return self._control


FORKS = ForkServer()
