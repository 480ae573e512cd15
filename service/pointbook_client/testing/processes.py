"""Child processes that do what a test asks for, and end with it."""

import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pointbook_client.testing.errors import PointbookTestingError

REPLY_SECONDS_MAX = 120.0
"""The time that a busy machine may need to start a database."""
STOP_SECONDS_MAX = 60.0
_LOG_LINES = 20
_READ_BYTES = 64 * 1024


class ChildProcess:
    """A Python module that serves requests in a process of its own.

    The first argument of the module is the process id of this process, with which it ends, also if that is killed.
    """

    def __init__(self, module: str, *arguments: str, log: Path) -> None:
        self._name = module
        self._log = log
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._received = b""
        with log.open("ab") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                # -P: modules of the tests' folder must not replace those of the server.
                (sys.executable, "-P", "-m", module, str(os.getpid()), *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                env={name: value for name, value in os.environ.items() if not name.startswith("POINTBOOK_")},
                # Ctrl-C reaches the tests only: their fixtures need the server until they have ended.
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def request(self, name: str, **parameters: Any) -> dict[str, Any]:
        """Send a request, and return the reply. Threads wait for each other.

        Raises PointbookTestingError if the work failed, the process has ended or takes too long.
        """
        with self._lock:
            number = next(self._numbers)
            self._write({"number": number, "request": name, **parameters})
            reply = self._read()
            while reply["number"] != number:  # the reply to a request whose test was interrupted
                reply = self._read()
        if "error" in reply:
            raise PointbookTestingError(reply["error"])
        return reply

    def kill(self) -> None:
        """Kill the process without a warning, and wait for its end."""
        self._process.kill()
        self._end()

    def stop(self) -> None:
        """Ask the process to end, wait until it has, and kill it if it takes too long."""
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - it is a pipe
        with contextlib.suppress(BrokenPipeError):
            # Closing it is not enough: a fork of this process holds it open too.
            stdin.write(b"\n")
        stdin.close()
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._end()

    def _end(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None  # noqa: S101 - both are pipes
            pipe.close()

    def _write(self, request: dict[str, Any]) -> None:
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - it is a pipe
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._ended() from None

    def _read(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101 - it is a pipe
        deadline = time.monotonic() + REPLY_SECONDS_MAX
        while b"\n" not in self._received:
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise PointbookTestingError(f"{self._name} does not reply within {REPLY_SECONDS_MAX:.0f} s")
            received = os.read(stdout.fileno(), _READ_BYTES)
            if not received:
                raise self._ended()
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _ended(self) -> PointbookTestingError:
        exit_code = self._process.wait()
        end = "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        return PointbookTestingError(f"{self._name} has ended with exit code {exit_code}:\n{end}")
