"""The server process: its settings, its start and its end."""

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path
from urllib.parse import quote

import asyncpg

from pointbook_cli.embedded_postgres import folder as folders
from pointbook_cli.embedded_postgres.folder import (
    FAST_SHUTDOWN_MAX_SECONDS,
    IMMEDIATE_SHUTDOWN_MAX_SECONDS,
    PORT,
    SUPERUSER,
)
from pointbook_cli.embedded_postgres.programs import (
    ENVIRONMENT,
    EmbeddedPostgresError,
    choose_account,
    find_binaries,
    reason,
)

_DATABASE = "pointbook"
_START_MAX_SECONDS = 300  # Recovery after a crash may have to read a lot of log.

_SETTINGS = (
    "listen_addresses=",
    f"port={PORT}",
    "unix_socket_permissions=0700",
    "max_connections=100",
    "shared_buffers=128MB",
    "timezone=UTC",
    "log_timezone=UTC",
    # Statements, their parameters and the rows that errors quote are personal data, so none of them is logged:
    # "log" as the least level leaves out the errors of statements, "terse" leaves out the details of the rest.
    "log_statement=none",
    "log_min_messages=log",
    "log_min_error_statement=panic",
    "log_error_verbosity=terse",
    "log_parameter_max_length=0",
    "log_parameter_max_length_on_error=0",
)
_DURABLE_SETTINGS = ("fsync=on", "synchronous_commit=on")
_HASTY_SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


class EmbeddedPostgres:
    """A PostgreSQL server of our own on a Unix socket, living no longer than the process that started it.

    `folder` (absolute or relative) is made when missing and is private to its owner (0700). With `fsync` off, a crash
    of the machine loses the data: that is for tests. On Linux the server shuts down by itself when the *thread* that
    called `start` ends, because the kernel ties a parent's death to the thread; elsewhere the next `start` ends it.
    """

    def __init__(self, folder: Path, *, fsync: bool = True) -> None:
        self._folder = folder.absolute()
        self._fsync = fsync
        self._socket_folder = folders.socket_folder(self._folder)
        self._owner_lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()  # One start or stop at a time, whichever tasks call them.

    def url(self, database: str = _DATABASE) -> str:
        """Return the URL of a database of this server: a Unix socket, and no password."""
        socket_folder = quote(str(self._socket_folder))
        return f"postgresql://{SUPERUSER}@/{quote(database, safe='')}?host={socket_folder}&port={PORT}"

    async def start(self) -> None:
        """Make the cluster when there is none, start the server and return when it accepts connections.

        A server that runs already is left as it is. Raises EmbeddedPostgresError when the folder is in use, belongs to
        somebody else or to another version of PostgreSQL, or when the server does not start; nothing is left running.
        """
        async with self._turn:
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
        """Return the server's exit code once it has ended; `start` may then be called again.

        Raises EmbeddedPostgresError when the server was not started.
        """
        if self._process is None:
            raise EmbeddedPostgresError(f"the database in {self._folder} was not started")
        return await self._process.wait()

    async def erase(self) -> None:
        """Remove the cluster for good, ending a server whose owner is gone; harmless when there is none.

        Raises EmbeddedPostgresError when the folder is in use or belongs to another user.
        """
        async with self._turn:
            folders.make_folder(self._folder)
            owner_lock = folders.take_owner_lock(self._folder)
            try:
                os.close(await folders.take_server_lock(self._folder))
                folders.remove_cluster(self._folder)
            finally:
                os.close(owner_lock)

    async def stop(self) -> None:
        """Disconnect all clients, shut the server down cleanly and free the folder; harmless when nothing runs.

        Takes 25 seconds at most: a server that does not finish its clean shutdown recovers at its next start. A start
        that is under way is waited for first.
        """
        async with self._turn:
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
        folders.make_folder(self._folder)
        if self._owner_lock is None:
            self._owner_lock = folders.take_owner_lock(self._folder)
        account, major = await choose_account(binaries / "postgres", self._folder)
        server_lock = await folders.take_server_lock(self._folder)
        try:
            folders.give_folder(self._folder, account)
            initdb = (*account.prefix, str(binaries / "initdb"), *(() if self._fsync else ("--no-sync",)))
            await folders.make_cluster(self._folder, major, initdb, server_lock)
            folders.clear_stale_pid(self._folder)
            folders.make_socket_folder(self._socket_folder, account)
            self._process = await self._spawn((*account.prefix, str(binaries / "postgres")), server_lock)
        finally:
            os.close(server_lock)
        await _until_ready(self._process, self._folder)
        await self._create_database()

    async def _spawn(self, postgres: tuple[str, ...], server_lock: int) -> asyncio.subprocess.Process:
        settings = [
            *_SETTINGS,
            *(_DURABLE_SETTINGS if self._fsync else _HASTY_SETTINGS),
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
                start_new_session=True,  # Ctrl-C is for us: the database must outlive the server's drain.
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


async def _until_ready(process: asyncio.subprocess.Process, folder: Path) -> None:
    """Wait until the server says in its pid file that it accepts connections."""
    log = folder / "server.log"
    try:
        async with asyncio.timeout(_START_MAX_SECONDS):
            while not _is_ready(folder):
                if process.returncode is not None:
                    raise EmbeddedPostgresError(
                        f"PostgreSQL does not start on {folder}: {reason(log.read_text(errors='replace'))} (see {log})"
                    )
                await asyncio.sleep(0.005)
    except TimeoutError as error:
        raise EmbeddedPostgresError(f"PostgreSQL is not ready after {_START_MAX_SECONDS} s (see {log})") from error


def _is_ready(folder: Path) -> bool:
    try:
        return folders.pid_file(folder).read_text().splitlines()[7].strip() == "ready"
    except (FileNotFoundError, IndexError):
        return False


async def _shut_down(process: asyncio.subprocess.Process) -> None:
    """End the server: cleanly, or else at once, or else by force."""
    for order, seconds in (
        (signal.SIGINT, FAST_SHUTDOWN_MAX_SECONDS),
        (signal.SIGQUIT, IMMEDIATE_SHUTDOWN_MAX_SECONDS),
        (signal.SIGKILL, None),
    ):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(order)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await process.wait()
                return
