"""When webhooks of stores were last accepted: a store may fall silent.

SHOPLINE deletes the subscription of an endpoint that keeps refusing its webhooks, and says nothing.
Source: docs/reference/shopline-webhooks.md#delivery-and-retries
"""

from typing import NamedTuple

from pointbook_common.durations import DAY_MS
from pointbook_server.db.database import Connection, Database
from pointbook_server.metrics import Metrics
from pointbook_server.programs import queries

STORES_SHOWN_MAX = 100
SHOWN_MS = 30 * DAY_MS
"""A store without webhooks for longer is not shown: it has closed, or the silence is known."""


class WebhookTimes:
    """Remembers the newest webhook of each store, and writes its time in rounds."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self._database = database
        self._metrics = metrics
        self._at_ms: dict[tuple[str, str], int] = {}
        """By merchant and store. Only webhooks of registered stores are accepted, which bounds its size."""

    def note(self, merchant_id: str, store_id: str, at_ms: int) -> None:
        """Remember that a webhook of a store was accepted at a time."""
        self._at_ms[merchant_id, store_id] = at_ms

    async def refresh_metrics(self, now_ms: int) -> None:
        """Write the times, and show those of the stores that have been silent the longest.

        If that raises DATABASE_UNAVAILABLE, the times stay for the next round.
        """
        await self.write()
        params = {"since_ms": now_ms - SHOWN_MS, "limit": STORES_SHOWN_MAX}
        rows = await self._database.read_planned(queries.LIST_SILENT_STORES, params)
        times: dict[tuple[str, ...], float] = {
            (row.merchant_id, row.store_id): row.last_webhook_at_ms / 1_000 for row in rows
        }
        self._metrics.store_last_webhook.replace(times)

    async def write(self) -> None:
        """Write the times that were noted since the last write."""
        noted, self._at_ms = self._at_ms, {}
        if not noted:
            return
        merchant_ids, store_ids = zip(*sorted(noted), strict=True)
        times = [noted[key] for key in sorted(noted)]
        params = {"merchant_ids": merchant_ids, "store_ids": store_ids, "at_ms": times}

        async def work(connection: Connection) -> None:
            await connection.execute(queries.WRITE_WEBHOOK_TIMES, params)

        try:
            await self._database.transaction(work)
        except BaseException:
            self._at_ms = noted | self._at_ms
            raise


class StoreWebhook(NamedTuple):
    """A store, when it was last changed, and when its newest webhook was accepted."""

    merchant_id: str
    store_id: str
    updated_at_ms: int
    last_webhook_at_ms: int | None


async def read_newest(connection: Connection) -> list[StoreWebhook]:
    """Return the newest webhook of each store of any merchant, up to a minute late."""
    return [StoreWebhook(*row) for row in await connection.fetch(queries.READ_WEBHOOK_TIMES)]
