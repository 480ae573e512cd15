"""The bound on all quarantines together, while webhooks are kept and given up beside the read of the sum."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pointbook_server.db.database import Database
from pointbook_server.metrics import Metrics
from pointbook_server.webhooks.model import Bounds
from pointbook_server.webhooks.quota import Quota


class SlowSum:
    """A database that answers what was kept when it was asked, once the test lets it."""

    def __init__(self) -> None:
        self.kept = 0
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator["SlowSum"]:
        """Yield a connection."""
        yield self

    async def fetch_one(self, _statement: object, _values: object) -> Any:
        """Return the sum as of the question."""
        kept = self.kept
        self.asked.set()
        await self.answers.wait()
        return SimpleNamespace(webhooks=kept, bytes=kept)


@pytest.mark.parametrize("is_kept", [True, False])
async def test_what_is_kept_while_the_sum_is_read_counts(is_kept: bool) -> None:  # noqa: FBT001 - a parameter
    """The sum does not have it, and the reservation is over: it must not be forgotten until the next read."""
    database = SlowSum()
    quota = Quota(cast("Database", database), Bounds(1, 1), Metrics())
    assert await quota.reserve(1)
    quota.expire()
    database.answers.clear()
    database.asked.clear()
    reading = asyncio.create_task(quota.refresh())
    await database.asked.wait()
    database.kept += is_kept
    quota.settle(1, may_be_kept=is_kept)
    more = asyncio.create_task(quota.reserve(1))
    await asyncio.sleep(0)
    assert not more.done()
    database.answers.set()
    await reading

    assert not await more
    quota.expire()
    assert await quota.reserve(1) is not is_kept
