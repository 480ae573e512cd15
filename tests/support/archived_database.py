"""A PostgreSQL with an archive, which can be restored to a time."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_cli.embedded_postgres.binaries import find_binaries, run_program
from pointbook_cli.embedded_postgres.folder import SUPERUSER
from support.connections import connected
from support.waiting import until

RECOVERY_SECONDS_MAX = 60.0
IS_ARCHIVED = "SELECT last_archived_wal >= $1 FROM pg_stat_archiver"


class ArchivedDatabase:
    """A database that copies its write-ahead log to a folder.

    The commands are those of docs/backup.md.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._archive = folder / "archive"
        self._backup = folder / "backup"
        self._postgres = EmbeddedPostgres(folder / "postgres")

    @property
    def url(self) -> str:
        """The URL of the database."""
        return self._postgres.url()

    async def start(self) -> None:
        """Start the database with an archive."""
        self._archive.mkdir(parents=True)
        self._archive.chmod(0o777)  # The database may run under another account.
        await self._postgres.start()
        async with connected(self.url) as connection:
            await connection.execute("ALTER SYSTEM SET archive_mode = on")
            copy = f'test ! -f "{self._archive}/%f" && cp "%p" "{self._archive}/%f"'
            await connection.execute(f"ALTER SYSTEM SET archive_command = '{copy}'")
        await self._postgres.stop()
        await self._postgres.start()

    async def back_up(self) -> None:
        """Write a base backup while the database is in use."""
        host = parse_qs(urlsplit(self.url).query)["host"][0]
        await run_program(
            str(find_binaries() / "pg_basebackup"),
            *(f"--host={host}", f"--username={SUPERUSER}", f"--pgdata={self._backup}"),
            *("--checkpoint=fast", "--wal-method=none"),
        )

    async def read_time(self) -> tuple[str, int]:
        """Return the time of the database's clock, as text and in ms."""
        async with connected(self.url) as connection:
            row = await connection.fetchrow(
                "SELECT now::text, (1000 * extract(epoch FROM now))::bigint AS ms FROM clock_timestamp() AS now"
            )
            return str(row["now"]), int(row["ms"])

    async def archive_all(self) -> None:
        """Wait until everything that is committed is in the archive."""
        async with connected(self.url) as connection:
            # A switch of an empty log does nothing.
            await connection.execute("SELECT pg_create_restore_point('the end')")
            name = await connection.fetchval("SELECT pg_walfile_name(pg_switch_wal())")

            async def is_archived() -> bool:
                return bool(await connection.fetchval(IS_ARCHIVED, name))

            await until(is_archived, RECOVERY_SECONDS_MAX)

    @asynccontextmanager
    async def restored_to(self, time: str) -> AsyncIterator[str]:
        """Run a second database, as this one was at a time, and yield its URL."""
        folder = self._folder / "restored"
        await asyncio.to_thread(shutil.copytree, self._backup, folder / "data")
        with (folder / "data" / "postgresql.auto.conf").open("a") as settings:
            settings.write(
                "archive_mode = off\n"
                f'restore_command = \'cp "{self._archive}/%f" "%p"\'\n'
                f"recovery_target_time = '{time}'\n"
                "recovery_target_action = promote\n"
            )
        (folder / "data" / "recovery.signal").touch()
        restored = EmbeddedPostgres(folder)
        await restored.start()
        try:
            yield restored.url()
        finally:
            await restored.stop()

    async def stop(self) -> None:
        """Stop the database."""
        await self._postgres.stop()
