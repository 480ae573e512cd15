"""Fixtures of the soak tests: a database that a test may stop, a deployment."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_server.db.migrations import migrate
from support.deployments import Deployment


@pytest.fixture(scope="module")
async def postgres(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedPostgres]:
    """A migrated database for the tests of a module."""
    database = EmbeddedPostgres(tmp_path_factory.mktemp("soak") / "postgres", fsync=False)
    await database.start()
    await migrate(database.url())
    yield database
    await database.stop()


@pytest.fixture
async def deployment(postgres: EmbeddedPostgres, tmp_path: Path) -> Deployment:
    """A deployment whose database runs, even if the previous test stopped it."""
    await postgres.start()
    return await Deployment.create(postgres.url(), tmp_path)
