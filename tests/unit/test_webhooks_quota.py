"""The total capacity, while webhooks are stored during the read of the sum."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pointbook_server.db.database import Database
from pointbook_server.metrics import Metrics
from pointbook_server.webhooks.model import Capacity
from pointbook_server.webhooks.quota import TotalQuota


class SlowDatabase:
    """A database that returns an old usage when the test sets `may_return`."""

    def __init__(self) -> None:
        self.stored = 0
        self.was_queried = asyncio.Event()
        self.may_return = asyncio.Event()
        self.may_return.set()

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator["SlowDatabase"]:
        """Yield this database as its own connection."""
        yield self

    async def fetch_one(self, _statement: object, _params: object) -> Any:
        """Return the usage at the time of the query."""
        stored = self.stored
        self.was_queried.set()
        await self.may_return.wait()
        return SimpleNamespace(webhooks=stored, bytes=stored)


@pytest.mark.parametrize("is_stored", [True, False])
async def test_webhook_stored_during_the_read_of_the_sum_counts(is_stored: bool) -> None:  # noqa: FBT001 - a parameter
    """The sum does not include it; it counts until the next read."""
    database = SlowDatabase()
    quota = TotalQuota(cast("Database", database), Capacity(1, 1), Metrics())
    assert await quota.reserve(1)
    quota.expire()
    database.may_return.clear()
    database.was_queried.clear()
    refresh = asyncio.create_task(quota.refresh())
    await database.was_queried.wait()
    database.stored += is_stored
    quota.settle(1, may_be_stored=is_stored)
    second_reservation = asyncio.create_task(quota.reserve(1))
    await asyncio.sleep(0)
    assert not second_reservation.done()
    database.may_return.set()
    await refresh

    assert not await second_reservation
    quota.expire()
    assert await quota.reserve(1) is not is_stored
