"""A supervisor of worker processes.

It replaces those that end or hang, and stops them together. A worker's standard input is one end of a socket pair; only
the supervisor holds the other end. The worker writes a byte to it each second once it serves, and reads only the end of
the stream, which means that the supervisor has ended.
"""

import asyncio
import contextlib
import faulthandler
import os
import random
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog

HEARTBEAT_SECONDS = 1.0
START_SECONDS_MAX = 60.0
"""The maximum time from a worker's start until it serves."""
STOP_SECONDS = 3.0
"""The maximum time that a worker may take to stop beyond its drain time."""
BACKOFF_SECONDS = 0.2
BACKOFF_SECONDS_MAX = 10.0
HEALTHY_SECONDS = 30.0
"""A worker that has served this long restarts with the shortest pause."""
KILLED = frozenset({signal.SIGKILL.name, signal.SIGTERM.name})
"""Ends from outside, such as by the kernel when memory runs out; they do not point to wrong settings."""
STACKS_SIGNAL = signal.SIGUSR1
"""The signal on which a worker logs the stacks of its threads, even while its event loop is blocked."""
STACKS_SECONDS = 0.3

log = structlog.get_logger()


class WorkerObserver(Protocol):
    """Observes the workers of a supervisor."""

    def worker_serves(self, number: int) -> None:
        """Note that a worker serves."""

    def worker_ended(self, number: int, *, was_stopped: bool) -> None:
        """Note that a worker has ended."""


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """The command and the timeouts of a supervisor's workers."""

    count: int
    program_of: Callable[[int], tuple[str, ...]]
    """Returns the path of a program, and its arguments, for a worker by its number, which its replacements keep."""
    environment: Mapping[str, str]
    """The environment variables that workers get in addition to those of the supervisor."""
    heartbeat_timeout_seconds: float
    drain_seconds: float
    inherited_by: Callable[[int], tuple[int, ...]] = lambda _number: ()
    """Returns the file descriptors that a worker inherits, with the same numbers."""
    observer: WorkerObserver | None = None


def pointbook_command(*arguments: str) -> tuple[str, ...]:
    """Return the `pointbook` command with arguments, run by this Python."""
    return (sys.executable, "-m", "pointbook_cli.main", *arguments)


class Backoff:
    """The pause before each restart of one worker.

    It doubles each time, until the worker has served for a while.
    """

    def __init__(self, jitter: Callable[[float, float], float] = random.uniform) -> None:
        self._jitter = jitter
        self._pause_seconds = BACKOFF_SECONDS

    def pause_seconds(self, served_seconds: float) -> float:
        """Return the pause before the restart of a worker that served for so many seconds."""
        if served_seconds >= HEALTHY_SECONDS:
            self._pause_seconds = BACKOFF_SECONDS
        pause = self._pause_seconds
        self._pause_seconds = min(2 * pause, BACKOFF_SECONDS_MAX)
        # Workers that ended together must not start together.
        return self._jitter(pause / 2, pause)


class Supervisor:
    """A supervisor of all workers of one service.

    It must not create gRPC objects: they do not survive a fork.
    """

    def __init__(self, command: WorkerCommand) -> None:
        self._command = command
        self._workers: dict[int, _Worker] = {}
        self._unclean: list[str] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Run the workers until the stop event.

        The event is also set when a worker fails at its first start. Raises OSError for such a failure, since retrying
        does not fix wrong settings, and if workers did not stop cleanly. A worker that has served once is restarted
        until it serves again.
        """
        tasks = [asyncio.create_task(self._run_and_replace(number, stop)) for number in range(self._command.count)]
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            stop.set()
            await self._stop(tasks)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        if self._unclean:
            raise OSError(f"not all workers stopped cleanly: {'; '.join(self._unclean)}")

    async def _run_and_replace(self, number: int, stop: asyncio.Event) -> None:
        """Run the worker of a number, and its replacements.

        Raises OSError if one ends before any has served.
        """
        backoff = Backoff()
        has_served = False
        while not stop.is_set():
            pid, cause, served_seconds = await self._run_worker(number, stop)
            if stop.is_set():
                log.info("worker stopped", number=number, pid=pid, cause=cause)
                # A worker that has just started has no handler for SIGTERM yet.
                if cause not in {"exit code 0", signal.SIGTERM.name}:
                    self._unclean.append(f"worker {number} ended by {cause}")
                return
            has_served = has_served or served_seconds is not None
            if not has_served and cause not in KILLED:
                raise OSError(f"worker {number} did not start ({cause}); see its log")
            pause = backoff.pause_seconds(served_seconds or 0.0)
            log.error("worker ended", number=number, pid=pid, cause=cause, restart_seconds=round(pause, 2))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await stop.wait()

    async def _run_worker(self, number: int, stop: asyncio.Event) -> tuple[int | None, str, float | None]:
        """Run one process until it ends.

        Return its id, the cause of its end, and how long it served if it did.
        """
        try:
            worker = await _Worker.start(number, self._command)
        except OSError as error:
            return None, f"no process: {error.strerror}", None
        self._workers[number] = worker
        if stop.is_set():
            worker.terminate()
        try:
            return worker.pid, await worker.wait(), worker.served_seconds()
        finally:
            del self._workers[number]
            if self._command.observer is not None:
                self._command.observer.worker_ended(number, was_stopped=stop.is_set())

    async def _stop(self, tasks: list[asyncio.Task[None]]) -> None:
        """Drain all workers concurrently, and wait until all have ended.

        Those that take too long are killed.
        """
        for worker in self._workers.values():
            worker.terminate()
        await asyncio.wait(tasks, timeout=self._command.drain_seconds + STOP_SECONDS)
        for worker in self._workers.values():
            log.error("worker killed: it did not stop in time", number=worker.number, pid=worker.pid)
            worker.kill()
        await asyncio.wait(tasks)


class _Worker:
    """One worker process, and the supervisor's end of its socket pair."""

    def __init__(self, number: int, process: Process, link: socket.socket, command: WorkerCommand) -> None:
        self.number = number
        self.pid = process.pid
        self._process = process
        self._link = link
        self._heartbeat_timeout_seconds = command.heartbeat_timeout_seconds
        self._observer = command.observer
        self._silence_seconds = 0.0
        self._started = time.monotonic()
        self._ready: float | None = None
        self._fault = ""

    @classmethod
    async def start(cls, number: int, command: WorkerCommand) -> "_Worker":
        """Start a process. Raises OSError if the system cannot."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)  # noqa: FBT003 - its only argument
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command.program_of(number),
                    stdin=theirs.fileno(),
                    env={**os.environ, **command.environment},
                    pass_fds=command.inherited_by(number),
                )
        except BaseException:
            ours.close()
            raise
        log.info("worker started", number=number, pid=process.pid)
        return cls(number, process, ours, command)

    async def wait(self) -> str:
        """Wait until the process ends, and return the cause.

        It is killed if it hangs.
        """
        watchers = [asyncio.create_task(self._receive_heartbeats()), asyncio.create_task(self._kill_if_silent())]
        try:
            exit_code = await self._process.wait()
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            self._link.close()
        return self._fault or (signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}")

    def served_seconds(self) -> float | None:
        """Return how long the worker has served; None if it never has."""
        return None if self._ready is None else time.monotonic() - self._ready

    def terminate(self) -> None:
        """Send SIGTERM: the worker drains and stops."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _receive_heartbeats(self) -> None:
        loop = asyncio.get_running_loop()
        # A reset means that the process ended without reading everything.
        with contextlib.suppress(ConnectionError):
            while await loop.sock_recv(self._link, 4_096):
                self._silence_seconds = 0.0
                if self._ready is None:
                    self._ready = time.monotonic()
                    seconds = round(self._ready - self._started, 2)
                    log.info("worker serves", number=self.number, pid=self.pid, start_seconds=seconds)
                    if self._observer is not None:
                        self._observer.worker_serves(self.number)

    async def _kill_if_silent(self) -> None:
        """Kill the process once it has sent no heartbeat for too long.

        Silence is counted in iterations of this loop, not by a clock: while the machine or all processes are suspended,
        none is counted, and workers can send a heartbeat first when they resume.
        """
        while not self._fault:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self._silence_seconds += HEARTBEAT_SECONDS
            if self._ready is None and self._silence_seconds >= START_SECONDS_MAX:
                self._fault = f"not serving after {START_SECONDS_MAX:g} s"
            elif self._ready is not None and self._silence_seconds >= self._heartbeat_timeout_seconds:
                self._fault = f"no heartbeat for {self._silence_seconds:g} s"
        log.error("worker hangs", number=self.number, pid=self.pid, cause=self._fault)
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(STACKS_SIGNAL)
        await asyncio.sleep(STACKS_SECONDS)
        self.kill()


async def run_as_worker(serve: Callable[[asyncio.Event, asyncio.Event], Awaitable[None]], stop: asyncio.Event) -> None:
    """Serve as a worker until the stop event or the end of the supervisor.

    `serve` gets the stop event, and an event to set once it serves; heartbeats start then.
    """
    faulthandler.register(STACKS_SIGNAL)
    loop = asyncio.get_running_loop()
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as link:
        link.setblocking(False)  # noqa: FBT003 - its only argument

        def stop_serving() -> None:
            loop.remove_reader(link)
            stop.set()

        ready = asyncio.Event()
        heartbeats = asyncio.create_task(_send_heartbeats(link, ready))
        loop.add_reader(link, stop_serving)
        try:
            await serve(stop, ready)
        finally:
            loop.remove_reader(link)
            heartbeats.cancel()


async def _send_heartbeats(link: socket.socket, ready: asyncio.Event) -> None:
    await ready.wait()
    while True:
        # A suspended supervisor reads nothing; the end of the supervisor is noticed by the reader.
        with contextlib.suppress(BlockingIOError, ConnectionError):
            link.send(b".")
        await asyncio.sleep(HEARTBEAT_SECONDS)
