"""The SQL of what redemptions add to a customer's timeline.

Each statement reads the newest rows of each name by an index, so that what it costs grows with the page and not with
the history.
"""

from collections.abc import Iterable
from dataclasses import asdict

from sqlalchemy import text

from pointbook_server.db.database import Database, Statement
from pointbook_server.redemption import queries
from pointbook_server.redemption.model import Closing, Redemption, StoredReversal
from pointbook_server.rpc.pagination import PageQuery


def _newest(table: str, names: str, at_ms: str, row_id: str) -> Statement:
    """Build the statement that lists the newest rows of each redeemer, all together the newest first."""
    return Statement(
        text(f"""
        SELECT r.* FROM unnest(CAST(:redeemers AS text[])) AS v (redeemer) CROSS JOIN LATERAL (
            SELECT {names} FROM {table}
            WHERE redeemer = v.redeemer AND merchant_id = :merchant_id AND {at_ms} >= CAST(:start_ms AS bigint)
                AND ({at_ms}, {row_id}) < (CAST(:before_ms AS bigint), CAST(:before_id AS text))
            ORDER BY {at_ms} DESC, {row_id} DESC LIMIT :limit
        ) AS r
        ORDER BY {at_ms} DESC, {row_id} DESC LIMIT :limit
    """)  # noqa: S608 - there is nothing in it but our own names
    )


LIST_REDEMPTIONS = _newest("redemptions", queries.NAMES, "created_at_ms", "redemption_id")
LIST_REVERSALS = _newest(
    "redemption_reversals",
    "redemption_id, reference, reversed_points, notes, created_at_ms, actor",
    "created_at_ms",
    "reference",
)
LIST_CLOSINGS = _newest(
    "redemption_audit", "audit_id, redemption_id, at_ms, action, points, reason, actor", "at_ms", "audit_id"
)


class TimelineStore:
    """Reads what was redeemed, reversed and closed under some names, the newest first."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def redemptions(self, merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> list[Redemption]:
        """Return a page of redemptions."""
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(LIST_REDEMPTIONS, _values(merchant_id, redeemers, query))
        return list(map(queries.read, rows))

    async def reversals(self, merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> list[StoredReversal]:
        """Return a page of reversals."""
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(LIST_REVERSALS, _values(merchant_id, redeemers, query))
        return list(map(queries.read_reversal, rows))

    async def closings(self, merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> list[Closing]:
        """Return a page of holds that were settled by hand, or released."""
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(LIST_CLOSINGS, _values(merchant_id, redeemers, query))
        return [Closing(*row) for row in rows]


def _values(merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> dict[str, object]:
    return {"merchant_id": merchant_id, "redeemers": sorted(redeemers), **asdict(query)}
