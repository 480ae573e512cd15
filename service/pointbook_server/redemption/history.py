"""The history of a customer's redemptions, newest first, for the timeline.

Each statement reads the newest rows of each redeemer by an index: its cost grows with the page, not with the history.
"""

from collections.abc import Iterable
from dataclasses import asdict

from pointbook_server.db.database import Database
from pointbook_server.redemption import queries
from pointbook_server.redemption.model import Closing, Redemption, StoredReversal
from pointbook_server.rpc.pagination import PageQuery


class RedemptionHistory:
    """A reader of the redemptions, reversals and closed holds of some redeemers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def redemptions(self, merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> list[Redemption]:
        """Return a page of redemptions."""
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(queries.LIST_NEWEST_REDEMPTIONS, _params(merchant_id, redeemers, query))
        return list(map(queries.read_redemption, rows))

    async def reversals(self, merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> list[StoredReversal]:
        """Return a page of reversals."""
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(queries.LIST_NEWEST_REVERSALS, _params(merchant_id, redeemers, query))
        return list(map(queries.read_reversal, rows))

    async def closings(self, merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> list[Closing]:
        """Return a page of holds that were settled by hand or released."""
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(queries.LIST_NEWEST_CLOSINGS, _params(merchant_id, redeemers, query))
        return [Closing(*row) for row in rows]


def _params(merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> dict[str, object]:
    return {"merchant_id": merchant_id, "redeemers": sorted(redeemers), **asdict(query)}
