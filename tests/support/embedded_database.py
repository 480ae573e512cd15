"""A PostgreSQL server for each process of a test run."""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg

from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_client.testing.folders import fastest_place

_LOG_MORE = """
ALTER ROLE ALL SET log_min_messages = warning;
ALTER ROLE ALL SET log_min_error_statement = error;
ALTER ROLE ALL SET log_error_verbosity = 'default'
"""
"""PostgreSQL's default log settings. The embedded database logs less, since errors may quote rows.

Without its quotes, `default` would leave the setting as it is.
"""


class Cluster:
    """A PostgreSQL server in a temporary folder, without fsync.

    Cloning a template takes some ten milliseconds; migrating an empty database takes seconds.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pointbook-tests-", dir=fastest_place()))
        self._postgres = EmbeddedPostgres(self._folder / "postgres", fsync=False)
        self._templates: dict[str, asyncio.Task[None]] = {}
        self._clones = 0

    async def start(self) -> None:
        """Start the server. Raises EmbeddedPostgresError if it cannot run here."""
        try:
            await self._postgres.start()
            await self._execute(_LOG_MORE)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server and delete its databases."""
        await self._postgres.stop()
        await asyncio.to_thread(shutil.rmtree, self._folder)

    def url(self, database: str) -> str:
        """Return the URL of a database of this server."""
        return self._postgres.url(database)

    @property
    def log(self) -> str:
        """The server's log."""
        return (self._folder / "postgres" / "server.log").read_text(errors="replace")

    async def template(self, name: str, prepare: Callable[[str], Awaitable[None]]) -> None:
        """Create a template, and fill it by `prepare`, which receives its URL.

        Later calls wait for the first. `prepare` must close its connections: PostgreSQL does not clone a database that
        is in use.
        """
        if name not in self._templates:
            self._templates[name] = asyncio.create_task(self._make_template(name, prepare))
        await asyncio.shield(self._templates[name])

    async def clone(self, template: str) -> str:
        """Clone a template, and return the URL of the copy. Calls may be concurrent."""
        self._clones += 1
        name = f"{template}_{self._clones}"
        # The default strategy WAL_LOG reads and logs each page, which takes twice the CPU time.
        await self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
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
