"""One PostgreSQL server for a whole run of the tests; each xdist worker has its own."""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg

from pointbook_cli.embedded_postgres import EmbeddedPostgres

_MEMORY = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a private folder in it.
_MEMORY_MIN_FREE_BYTES = 4 * 1024**3
_LOGGED = {"log_min_messages": "warning", "log_min_error_statement": "error", "log_error_verbosity": "default"}
"""What a database of one's own logs by default, where the embedded one keeps still: it may quote rows."""


class Cluster:
    """A running server on a temporary folder, without fsync.

    A test that needs a database to itself clones a template, which takes some tens of milliseconds, where
    migrating an empty database takes seconds.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pointbook-tests-", dir=_fastest_place()))
        self._postgres = EmbeddedPostgres(self._folder / "postgres", fsync=False)
        self._templates: dict[str, asyncio.Task[None]] = {}
        self._clones = 0

    async def start(self) -> None:
        """Start the server; raises EmbeddedPostgresError when it cannot run here."""
        try:
            await self._postgres.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server and remove all its databases."""
        await self._postgres.stop()
        await asyncio.to_thread(shutil.rmtree, self._folder)

    def url(self, database: str) -> str:
        """Return the URL of a database of this server."""
        return self._postgres.url(database)

    @property
    def log(self) -> str:
        """What the server has logged so far."""
        return (self._folder / "postgres" / "server.log").read_text(errors="replace")

    async def template(self, name: str, prepare: Callable[[str], Awaitable[None]]) -> None:
        """Create the database `name` and have `prepare` fill it, given its URL; later calls wait for the first.

        `prepare` must close its connections: PostgreSQL clones no database that is in use.
        """
        if name not in self._templates:
            self._templates[name] = asyncio.create_task(self._make_template(name, prepare))
        await asyncio.shield(self._templates[name])

    async def clone(self, template: str) -> str:
        """Return the URL of a fresh copy of the template; calls may run side by side."""
        self._clones += 1
        name = f"{template}_{self._clones}"
        # WAL_LOG, the default strategy: FILE_COPY makes two checkpoints, which took half as long again and, at
        # times, 300 ms.
        await self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        await self._execute(";".join(f'ALTER DATABASE "{name}" SET {each} = {_LOGGED[each]}' for each in _LOGGED))
        return self.url(name)

    async def _make_template(self, name: str, prepare: Callable[[str], Awaitable[None]]) -> None:
        await self._execute(f'CREATE DATABASE "{name}"')
        await prepare(self.url(name))

    async def _execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url("postgres"))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


def _fastest_place() -> Path | None:
    """Return memory when there is plenty (a clone on a disk takes up to ten times as long), else None: the usual."""
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _MEMORY_MIN_FREE_BYTES:
        return _MEMORY
    return None
