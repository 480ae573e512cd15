"""The server process: its settings, start and stop."""

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path
from urllib.parse import quote

import asyncpg

from pointbook_cli.embedded_postgres import folder as folders
from pointbook_cli.embedded_postgres import locks
from pointbook_cli.embedded_postgres.binaries import ENVIRONMENT, failure_cause, find_binaries
from pointbook_cli.embedded_postgres.errors import EmbeddedPostgresError
from pointbook_cli.embedded_postgres.folder import PORT, SUPERUSER
from pointbook_cli.embedded_postgres.os_account import choose_account

_DATABASE = "pointbook"
_START_SECONDS_MAX = 300  # Recovery after a crash may have to read a large log.
_POLL_SECONDS = 0.005

_SETTINGS = (
    "listen_addresses=",
    f"port={PORT}",
    "unix_socket_permissions=0700",
    "max_connections=100",
    "shared_buffers=128MB",
    "timezone=UTC",
    "log_timezone=UTC",
    # Statements, their parameters and rows quoted in errors are personal data and must not be logged. The minimum
    # level "log" drops the errors of statements, "terse" drops the details of other messages.
    "log_statement=none",
    "log_min_messages=log",
    "log_min_error_statement=panic",
    "log_error_verbosity=terse",
    "log_parameter_max_length=0",
    "log_parameter_max_length_on_error=0",
)
_DURABLE_SETTINGS = ("fsync=on", "synchronous_commit=on")
_FAST_SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


class EmbeddedPostgres:
    """A PostgreSQL server on a Unix socket that ends with the process that started it.

    `folder` (absolute or relative) is created if missing and is private to its owner (0700). Without `fsync`, which is
    for tests, a crash of the machine loses the data. On Linux the server shuts down when the *thread* that called
    `start` ends, because the kernel's parent-death signal is per thread; elsewhere the next `start` stops it.
    """

    def __init__(self, folder: Path, *, fsync: bool = True) -> None:
        self._folder = folder.absolute()
        self._fsync = fsync
        self._socket_folder = folders.socket_folder(self._folder)
        self._owner_lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._lifecycle_lock = asyncio.Lock()  # One start or stop at a time.

    def url(self, database: str = _DATABASE) -> str:
        """Return the URL of a database: a Unix socket without a password."""
        socket_folder = quote(str(self._socket_folder))
        return f"postgresql://{SUPERUSER}@/{quote(database, safe='')}?host={socket_folder}&port={PORT}"

    async def start(self) -> None:
        """Create the cluster if there is none, and start the server.

        Return once it accepts connections; if it is running, do nothing. Raises EmbeddedPostgresError if the folder is
        in use or belongs to another user or version of PostgreSQL, or if the server does not start; no process is left
        running.
        """
        async with self._lifecycle_lock:
            if self._process is not None and self._process.returncode is None:
                return
            try:
                await self._start()
            except OSError as error:
                await self._stop()
                raise EmbeddedPostgresError(f"cannot use the database folder {self._folder}: {error}") from error
            except BaseException:
                await self._stop()
                raise

    async def wait(self) -> int:
        """Wait until the server ends, and return its exit code.

        `start` may then be called again. Raises EmbeddedPostgresError if the server was not started.
        """
        if self._process is None:
            raise EmbeddedPostgresError(f"the database in {self._folder} was not started")
        return await self._process.wait()

    async def erase(self) -> None:
        """Delete the cluster, if there is one, and stop a server whose owner has ended.

        Raises EmbeddedPostgresError if the folder is in use or belongs to another user.
        """
        async with self._lifecycle_lock:
            folders.create_folder(self._folder)
            owner_lock = locks.acquire_owner_lock(self._folder)
            try:
                os.close(await locks.acquire_server_lock(self._folder))
                folders.remove_cluster(self._folder)
            finally:
                os.close(owner_lock)

    async def stop(self) -> None:
        """Disconnect all clients, shut the server down cleanly and release the folder.

        Do nothing if the server is not running. It takes at most 25 seconds; a server that does not shut down cleanly
        in time recovers at its next start. A concurrent start is completed first.
        """
        async with self._lifecycle_lock:
            await self._stop()

    async def _stop(self) -> None:
        if self._owner_lock is None:
            return
        if self._process is not None:
            await _shut_down(self._process)
            self._process = None
            shutil.rmtree(self._socket_folder, ignore_errors=True)
        os.close(self._owner_lock)
        self._owner_lock = None

    async def _start(self) -> None:
        binaries = find_binaries()
        folders.create_folder(self._folder)
        if self._owner_lock is None:
            self._owner_lock = locks.acquire_owner_lock(self._folder)
        account, major = await choose_account(binaries / "postgres", self._folder)
        server_lock = await locks.acquire_server_lock(self._folder)
        try:
            folders.change_owner(self._folder, account)
            initdb = (*account.prefix, str(binaries / "initdb"), *(() if self._fsync else ("--no-sync",)))
            await folders.create_cluster(self._folder, major, initdb, server_lock)
            locks.remove_stale_pid_file(self._folder)
            folders.create_socket_folder(self._socket_folder, account)
            self._process = await self._spawn((*account.prefix, str(binaries / "postgres")), server_lock)
        finally:
            os.close(server_lock)
        await _wait_until_ready(self._process, self._folder)
        await self._create_database()

    async def _spawn(self, postgres: tuple[str, ...], server_lock: int) -> asyncio.subprocess.Process:
        settings = [
            *_SETTINGS,
            *(_DURABLE_SETTINGS if self._fsync else _FAST_SETTINGS),
            f'unix_socket_directories="{self._socket_folder}"',
        ]
        options = [part for setting in settings for part in ("-c", setting)]
        log = folders.open_log(self._folder)
        try:
            return await asyncio.create_subprocess_exec(
                *postgres,
                "-D",
                str(self._folder / "data"),
                *options,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=ENVIRONMENT,
                pass_fds=(server_lock,),
                start_new_session=True,  # Ctrl-C must not reach the database before the server is drained.
            )
        finally:
            os.close(log)

    async def _create_database(self) -> None:
        connection = await asyncpg.connect(
            host=str(self._socket_folder), port=PORT, user=SUPERUSER, database="postgres"
        )
        try:
            names = await connection.fetch("SELECT datname FROM pg_database")
            if _DATABASE not in {row["datname"] for row in names}:
                await connection.execute(f"CREATE DATABASE {_DATABASE}")
        finally:
            await connection.close()


async def _wait_until_ready(process: asyncio.subprocess.Process, folder: Path) -> None:
    """Wait until the server's pid file states that it accepts connections."""
    log = folder / "server.log"
    try:
        async with asyncio.timeout(_START_SECONDS_MAX):
            while not _is_ready(folder):
                if process.returncode is not None:
                    cause = failure_cause(log.read_text(errors="replace"))
                    raise EmbeddedPostgresError(f"PostgreSQL does not start on {folder}: {cause} (see {log})")
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError as error:
        raise EmbeddedPostgresError(f"PostgreSQL is not ready after {_START_SECONDS_MAX} s (see {log})") from error


def _is_ready(folder: Path) -> bool:
    try:
        return locks.pid_file(folder).read_text().splitlines()[7].strip() == "ready"
    except (FileNotFoundError, IndexError):
        return False


async def _shut_down(process: asyncio.subprocess.Process) -> None:
    """Stop the server: cleanly, or else immediately, or else by SIGKILL."""
    for stop_signal, seconds in (
        (signal.SIGINT, locks.FAST_SHUTDOWN_SECONDS_MAX),
        (signal.SIGQUIT, locks.IMMEDIATE_SHUTDOWN_SECONDS_MAX),
        (signal.SIGKILL, None),
    ):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(stop_signal)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await process.wait()
                return
