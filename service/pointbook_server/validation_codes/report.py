"""Reports on the one-time codes of a merchant, for operators.

The audit counts repeated events in one row per UTC day, so only UTC days have exact counts. Such a row may count events
for several programs, so there are no counts by program or store.
"""

from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

from pointbook_server.calendars import Calendar, utc_day
from pointbook_server.db.database import LIFT_TIME_LIMIT, Connection, Database
from pointbook_server.ledger.lots import NEVER_MS
from pointbook_server.validation_codes import report_queries
from pointbook_server.validation_codes.audit import AuditAction


@dataclass(frozen=True, slots=True)
class CodesScope:
    """A merchant, and the UTC days of events; None does not bound them."""

    merchant_id: str
    first_day: date | None = None
    last_day: date | None = None


class CodeEvents(NamedTuple):
    """How often an action had an outcome on a UTC day.

    The channel is empty for an event without a live challenge.
    """

    day: date
    action: AuditAction
    channel: str
    outcome: str
    events: int


class CodeReporter:
    """A reporter on one-time codes, which may run while the service writes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, scope: CodesScope) -> list[CodeEvents]:
        """Return the events of a merchant on one snapshot, in order.

        Raises DATABASE_UNAVAILABLE.
        """
        utc = Calendar("UTC")
        params = {
            "merchant_id": scope.merchant_id,
            "start_ms": 0 if scope.first_day is None else utc.start_ms(scope.first_day),
            "end_ms": NEVER_MS if scope.last_day is None else utc.end_ms(scope.last_day),
        }

        async def work(connection: Connection) -> list[CodeEvents]:
            await connection.execute(LIFT_TIME_LIMIT)
            return sorted(
                [
                    CodeEvents(utc_day(row.day), AuditAction(row.action), row.channel, row.outcome, int(row.events))
                    async for row in connection.stream(report_queries.STREAM_COUNTS, params)
                ],
                key=lambda each: (each.day, _ORDER[each.action], each.channel, each.outcome),
            )

        return await self._database.snapshot(work)


_ORDER = {action: number for number, action in enumerate(AuditAction)}
