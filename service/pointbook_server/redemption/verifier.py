"""Verification of redemptions against their own sums, accounts and entries."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pointbook_server.db.database import LIFT_TIME_LIMIT, Connection, Database
from pointbook_server.ledger.model import AccountKey
from pointbook_server.redemption import queries
from pointbook_server.redemption.model import HoldState, Redemption


class RedemptionMismatch(NamedTuple):
    """A contradiction within a redemption, or with an account or an entry."""

    merchant_id: str
    redemption_id: str
    text: str


class RedemptionVerifier:
    """A verifier of redemptions, which may run while the service writes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(
        self,
        merchant_id: str,
        store_id: str,
        buyer_id: str,
        now_ms: int,
        report: Callable[[RedemptionMismatch], None],
    ) -> None:
        """Verify the redemptions that drew from some accounts, on one snapshot.

        Empty ids match all. Raises DATABASE_UNAVAILABLE.
        """
        params = {"merchant_id": merchant_id, "store_id": store_id, "buyer_id": buyer_id, "now_ms": now_ms}

        async def work(connection: Connection) -> None:
            await connection.execute(LIFT_TIME_LIMIT)
            async for row in connection.stream(queries.STREAM_REDEMPTIONS, params):
                redemption = queries.read_redemption(row)
                sums = (row.open_points, row.released_points, row.reversed_points)
                for text in _contradictions(redemption, sums):
                    report(RedemptionMismatch(redemption.merchant_id, redemption.redemption_id, text))
            for statement in (queries.STREAM_HOLD_MISMATCHES, queries.STREAM_SETTLEMENT_MISMATCHES):
                async for row in connection.stream(statement, params):
                    text = _describe(row.store_id, row.buyer_id, row.text)
                    report(RedemptionMismatch(row.merchant_id, row.redemption_id, text))

        await self._database.snapshot(work)


def _contradictions(redemption: Redemption, sums: tuple[int, int, int]) -> Iterator[str]:
    """Yield the contradictions between a redemption's points, draws and holds."""
    drawn = sum(draw.points for draw in redemption.draws)
    if drawn != redemption.content.points:
        yield f"drew {drawn} instead of {redemption.content.points} points"
    left: Counter[AccountKey] = Counter()
    for draw in redemption.draws:
        left[draw.key] += draw.points - draw.reversed_points
    for hold in redemption.holds:
        if hold.points != (points := left.pop(hold.key, 0)):
            yield _describe(*hold.key, f"holds {hold.points} points, but its draws leave {points}")
    for key in left:
        yield _describe(*key, "was drawn from, but has no hold")
    expected = (
        redemption.held_points(HoldState.OPEN),
        redemption.held_points(HoldState.RELEASED),
        redemption.reversed_points,
    )
    if sums != expected:
        yield f"open, released and reversed points are stored as {sums} instead of {expected}"


def _describe(store_id: str, buyer_id: str, text: str) -> str:
    return f"store {store_id}, buyer {buyer_id}: {text}"
