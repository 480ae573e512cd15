"""Reports on the redemptions of a merchant, for operators."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import NamedTuple, Protocol

from pointbook_server.calendars import QUARTER_MS, Calendar, is_within, widest_bounds_ms
from pointbook_server.db.database import LIFT_TIME_LIMIT, Connection, Database, Row
from pointbook_server.ledger.lots import NEVER_MS
from pointbook_server.programs.model import DEFAULT_TIME_ZONE, Program
from pointbook_server.redemption import report_queries

ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class RedemptionScope:
    """A merchant, one of its stores or all (empty), and days.

    The days are those on which points were redeemed, in each program's time zone unless `time_zone` is set; None does
    not bound them. A store means the redemptions that drew from it, as a whole.
    """

    merchant_id: str
    store_id: str = ""
    first_day: date | None = None
    last_day: date | None = None
    time_zone: str = ""


class RedemptionGroup(NamedTuple):
    """The program, month and state that redemptions have in common."""

    program_id: int
    month: str
    state: str


@dataclass(slots=True)
class RedemptionSums:
    """The sums of some redemptions.

    The values are those of all redeemed points; `reversed_value` is the part of the reversed ones, in the base
    currency. Overdue points should have been booked or released by now.
    """

    redemptions: int = 0
    points: int = 0
    redeem_value: Decimal = ZERO
    redeem_local_value: Decimal = ZERO
    reversed_points: int = 0
    reversed_value: Decimal = ZERO
    overdue: int = 0
    overdue_points: int = 0

    def add(self, row: Row) -> None:
        """Add a row of STREAM_SUMS."""
        self.redemptions += row.redemptions
        self.points += int(row.points)
        self.redeem_value += row.redeem_value or ZERO
        self.redeem_local_value += row.redeem_local_value or ZERO
        self.reversed_points += int(row.reversed_points)
        self.reversed_value += row.reversed_value or ZERO
        self.overdue += row.overdue
        self.overdue_points += int(row.overdue_points)


@dataclass(frozen=True, slots=True)
class RedemptionReport:
    """Sums by program, month and state, in order, and the current programs."""

    sums: dict[RedemptionGroup, RedemptionSums]
    programs: dict[int, Program]


class Programs(Protocol):
    """Reads the programs of redemptions."""

    async def read(self, connection: Connection, merchant_id: str, program_ids: Collection[int]) -> dict[int, Program]:
        """Return those of some programs that the merchant has, by their ids."""


class OverdueHolds(NamedTuple):
    """The redemptions of all merchants with overdue points, and the earliest due time."""

    redemptions: int
    points: int
    oldest_at_ms: int | None


class RedemptionReporter:
    """A reporter on redemptions, which may run while the service writes."""

    def __init__(self, database: Database, programs: Programs) -> None:
        self._database = database
        self._programs = programs

    async def run(self, scope: RedemptionScope, now_ms: int) -> RedemptionReport:
        """Return the report on one snapshot, with only sums in memory.

        Raises DATABASE_UNAVAILABLE.
        """
        start_ms, end_ms = widest_bounds_ms(scope.first_day, scope.last_day)
        params = {
            "merchant_id": scope.merchant_id,
            "store_id": scope.store_id,
            "start_ms": -NEVER_MS if start_ms is None else start_ms,
            "end_ms": NEVER_MS if end_ms is None else end_ms,
            "now_ms": now_ms,
        }

        async def work(connection: Connection) -> RedemptionReport:
            await connection.execute(LIFT_TIME_LIMIT)
            programs: dict[int, Program] = {}
            calendars: dict[int, Calendar] = {}
            sums: dict[RedemptionGroup, RedemptionSums] = {}
            async for row in connection.stream(report_queries.STREAM_SUMS, params):
                program_id = row.program_id
                if program_id not in programs:
                    programs |= await self._programs.read(connection, scope.merchant_id, [program_id])
                    calendars[program_id] = Calendar(
                        scope.time_zone or programs[program_id].time_zone or DEFAULT_TIME_ZONE
                    )
                day = calendars[program_id].day(row.quarter * QUARTER_MS)
                if is_within(day, scope.first_day, scope.last_day):
                    group = RedemptionGroup(program_id, day.isoformat()[:7], row.state)
                    sums.setdefault(group, RedemptionSums()).add(row)
            used = {group.program_id for group in sums}
            return RedemptionReport(dict(sorted(sums.items())), {key: programs[key] for key in sorted(used)})

        return await self._database.snapshot(work)


async def read_overdue(connection: Connection, now_ms: int) -> OverdueHolds:
    """Return the overdue holds of all merchants."""
    (row,) = await connection.fetch(report_queries.COUNT_OVERDUE, {"now_ms": now_ms})
    return OverdueHolds(row.redemptions, int(row.points), row.oldest_at_ms)
