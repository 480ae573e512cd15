"""Whether accounts hold what redemptions promised, no more and no less, and whether redemptions add up."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pointbook_server.db.database import LIFT_TIME_LIMIT, Connection, Database
from pointbook_server.ledger.model import AccountKey
from pointbook_server.redemption import queries
from pointbook_server.redemption.model import HoldState, Redemption


class Difference(NamedTuple):
    """Something that accounts and redemptions, or two parts of one redemption, do not agree about."""

    merchant_id: str
    redemption_id: str
    text: str


class RedemptionsAudit:
    """Verifies redemptions, and what accounts hold for them, while the service goes on writing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(
        self, merchant_id: str, store_id: str, buyer_id: str, now_ms: int, tell: Callable[[Difference], None]
    ) -> None:
        """Verify the redemptions that drew from some accounts, on one state of the database; empty ids mean all.

        Raises DATABASE_UNAVAILABLE.
        """
        wanted = {"merchant_id": merchant_id, "store_id": store_id, "buyer_id": buyer_id, "now_ms": now_ms}

        async def work(connection: Connection) -> None:
            await connection.execute(LIFT_TIME_LIMIT)
            async for row in connection.stream(queries.STREAM_REDEMPTIONS, wanted):
                redemption = queries.read(row)
                sums = (row.open_points, row.released_points, row.reversed_points)
                for text in _contradictions(redemption, sums):
                    tell(Difference(redemption.merchant_id, redemption.redemption_id, text))
            for statement in (queries.STREAM_DIFFERING_HOLDS, queries.STREAM_DIFFERING_SETTLEMENTS):
                async for row in connection.stream(statement, wanted):
                    tell(Difference(row.merchant_id, row.redemption_id, _shown(row.store_id, row.buyer_id, row.text)))

        await self._database.snapshot(work)


def _contradictions(redemption: Redemption, sums: tuple[int, int, int]) -> Iterator[str]:
    """Tell what of a redemption does not add up: its draws, what it holds of each account, and its sums."""
    drawn = sum(draw.points for draw in redemption.draws)
    if drawn != redemption.content.points:
        yield f"drew {drawn} for {redemption.content.points} points"
    left: Counter[AccountKey] = Counter()
    for draw in redemption.draws:
        left[draw.key] += draw.points - draw.reversed_points
    for hold in redemption.holds:
        if hold.points != left.pop(hold.key, 0):
            yield _shown(*hold.key, f"has a hold of {hold.points} points that its draws do not come to")
    for key in left:
        yield _shown(*key, "was drawn from and has no hold")
    told = (redemption.held(HoldState.OPEN), redemption.held(HoldState.RELEASED), redemption.reversed_points)
    if sums != told:
        yield f"open, released and reversed points are {told} and stored as {sums}"


def _shown(store_id: str, buyer_id: str, text: str) -> str:
    return f"store {store_id}, buyer {buyer_id}: {text}"
