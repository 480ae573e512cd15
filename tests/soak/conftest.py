"""What the soak tests share: a database in a folder of its own, which a test may stop, and a site on it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_server.db.migrations import migrate
from support.sites import Site


@pytest.fixture(scope="module")
async def postgres(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedPostgres]:
    """A migrated database for the tests of a file."""
    database = EmbeddedPostgres(tmp_path_factory.mktemp("soak") / "postgres", fsync=False)
    await database.start()
    await migrate(database.url())
    yield database
    await database.stop()


@pytest.fixture
async def site(postgres: EmbeddedPostgres, tmp_path: Path) -> Site:
    """A place for a server and a shim; the database runs, whatever the test before did to it."""
    await postgres.start()
    return await Site.on(postgres.url(), tmp_path)
