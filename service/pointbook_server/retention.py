"""Retention: which rows are deleted, how long after what, and how.

The ledger, redemptions and everything else that makes a repeated call harmless is never deleted: see docs/retention.md.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from pointbook_common.durations import DAY_MS
from pointbook_server.db.aging_tables import ROWS_IN_BATCH_MAX, AgingTable
from pointbook_server.db.database import JOIN_BY_INDEX, Connection, Database, Statement
from pointbook_server.settings import ServerSettings
from pointbook_server.validation_codes.rate_limits import LONGEST_WINDOW_MS
from pointbook_server.webhooks.queries import FINISHED_WEBHOOKS
from pointbook_server.webhooks.transactions import QuarantineTransactions

ROWS_IN_ROUND_MAX = 50_000
"""The number of deleted rows after which a table waits for its next round."""
SECONDS_IN_ROUND_MAX = 10.0
"""The time after which a table waits for its next round."""

TABLES = (
    AgingTable("customer_audit", ("customer_id", "audit_id"), "at_ms", "at_ms > 0", is_updated=False),
    AgingTable("customer_updates", ("event_id",), "updated_at_ms", "updated_at_ms > 0", is_updated=False),
    AgingTable("missed_calls", ("call_digest",), "at_ms", "at_ms > 0"),
    FINISHED_WEBHOOKS,
    AgingTable("redemption_audit", ("redemption_id", "audit_id"), "at_ms", "at_ms > 0", is_updated=False),
    AgingTable("redemption_refusals", ("customer", "at_ms", "refusal_id"), "at_ms", "at_ms > 0", is_updated=False),
    AgingTable("validation_audit", ("customer", "at_ms", "audit_id"), "at_ms", "at_ms > 0"),
    AgingTable("validation_challenges", ("challenge_id",), "expires_at_ms", "points > 0"),
    AgingTable("validation_tallies", ("subject",), "updated_at_ms", "revision > 0"),
)
FIND_OLD = {table.name: Statement(table.find_sql(), f"retention.find_{table.name}") for table in TABLES}
DELETE_OLD = {
    table.name: Statement(table.delete_sql(), f"retention.delete_{table.name}")
    for table in TABLES
    if table is not FINISHED_WEBHOOKS
}
COUNT_OLD = {table.name: Statement(table.count_sql(), f"retention.count_{table.name}") for table in TABLES}


class OldRows(NamedTuple):
    """A merchant's old rows from one time to another, both included, in ms."""

    merchant_id: str
    from_ms: int
    until_ms: int


class TableCleanUp:
    """Deletes the rows of one table once they are older than its retention.

    Several servers may do this at once: rows that another transaction has locked wait for the next round, and rows that
    are never updated are locked by other clean-ups alone. Without a
    retention (None), nothing is deleted. `delete` deletes some rows in another way than one statement.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        keep_ms: int | None,
        delete: Callable[[OldRows], Awaitable[int]] | None = None,
    ) -> None:
        self.name = name
        self._database = database
        self._keep_ms = keep_ms
        self._delete = delete or self._delete_rows

    async def clean_up(self, now_ms: int) -> int:
        """Delete rows that are too old at a time of the database's clock; return how many.

        It pauses as long as each deletion takes, and stops after ROWS_IN_ROUND_MAX rows or SECONDS_IN_ROUND_MAX, so
        that a large backlog slows down neither calls nor other jobs.
        """
        if self._keep_ms is None:
            return 0
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + SECONDS_IN_ROUND_MAX
        count, previous = 0, -1
        while count > previous:
            previous = count
            for rows in await self._find(now_ms - self._keep_ms):
                deleted = ROWS_IN_BATCH_MAX
                while deleted >= ROWS_IN_BATCH_MAX:
                    began_at = loop.time()
                    deleted = await self._delete(rows)
                    count += deleted
                    await asyncio.sleep(loop.time() - began_at)
                    if count >= ROWS_IN_ROUND_MAX or loop.time() > ends_at:
                        return count
        return count

    async def backlog(self, now_ms: int) -> int:
        """Return how many rows are too old at a time, counted up to BACKLOG_MAX."""
        if self._keep_ms is None:
            return 0
        async with self._database.autocommit() as connection:
            row = await connection.fetch_one(COUNT_OLD[self.name], {"before_ms": now_ms - self._keep_ms})
        return 0 if row is None else int(row.count)

    async def _find(self, before_ms: int) -> list[OldRows]:
        """Return the merchants of the oldest rows, without locking anything."""
        async with self._database.autocommit() as connection:
            rows = await connection.fetch(FIND_OLD[self.name], {"before_ms": before_ms})
        return [OldRows(*row) for row in rows]

    async def _delete_rows(self, rows: OldRows) -> int:
        async def delete(connection: Connection) -> int:
            await connection.execute(JOIN_BY_INDEX)
            return await connection.count_written(DELETE_OLD[self.name], rows._asdict())

        return await self._database.transaction(delete)


def build_clean_ups(
    settings: ServerSettings, database: Database, quarantine: QuarantineTransactions
) -> tuple[TableCleanUp, ...]:
    """Return the clean-up of each table whose rows have a retention."""

    async def delete_webhooks(rows: OldRows) -> int:
        return await quarantine.delete_finished(*rows)

    codes_ms = settings.codes_keep_days * DAY_MS
    return (
        TableCleanUp(database, "validation_challenges", codes_ms),
        TableCleanUp(database, "missed_calls", codes_ms),
        TableCleanUp(database, "validation_tallies", LONGEST_WINDOW_MS),
        TableCleanUp(database, "validation_audit", _unless_forever(settings.validation_audit_keep_days)),
        TableCleanUp(database, "redemption_audit", _unless_forever(settings.redemption_audit_keep_days)),
        TableCleanUp(database, "redemption_refusals", settings.refusals_keep_days * DAY_MS),
        TableCleanUp(database, "customer_audit", _unless_forever(settings.customer_audit_keep_days)),
        TableCleanUp(database, "customer_updates", _unless_forever(settings.customer_updates_keep_days)),
        TableCleanUp(
            database,
            FINISHED_WEBHOOKS.name,
            _unless_forever(settings.finished_webhooks_keep_days),
            delete=delete_webhooks,
        ),
    )


def _unless_forever(keep_days: int) -> int | None:
    """Convert a setting to ms; 0 days mean forever, which is None."""
    return keep_days * DAY_MS or None
