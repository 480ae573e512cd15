"""`pointbook report`: reads a merchant's reports, and returns them as tables."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import date
from typing import TypeVar

from pointbook_cli.report_tables import ReportTable, code_table, points_table, redemption_table
from pointbook_cli.services.database_checks import check_migrated
from pointbook_server.calendars import Calendar
from pointbook_server.clock import system_clock
from pointbook_server.db.database import Database
from pointbook_server.ledger.report import LedgerReporter, PointsScope
from pointbook_server.programs.model import DEFAULT_TIME_ZONE
from pointbook_server.programs.transactions import ProgramTransactions
from pointbook_server.redemption.report import RedemptionReporter, RedemptionScope
from pointbook_server.validation_codes.report import CodeReporter, CodesScope

PAGE_SIZE = 1_000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReportQuery:
    """What to report: a merchant, one of its stores or all (empty), and days.

    None does not bound the days. An empty time zone means that of the programs.
    """

    merchant_id: str
    store_id: str = ""
    first_day: date | None = None
    last_day: date | None = None
    time_zone: str = ""


async def report_points(url: str, query: ReportQuery) -> ReportTable:
    """Return the points of a merchant.

    Raises OSError, and DATABASE_UNAVAILABLE.
    """

    async def work(database: Database) -> ReportTable:
        calendar = Calendar(query.time_zone or await _find_time_zone(database, query))
        scope = PointsScope(
            query.merchant_id,
            query.store_id,
            None if query.first_day is None else calendar.start_ms(query.first_day),
            None if query.last_day is None else calendar.end_ms(query.last_day),
        )
        return points_table(await LedgerReporter(database).run(scope, calendar, system_clock()), calendar.name)

    return await _with_database(url, query, work)


async def report_redemptions(url: str, query: ReportQuery) -> ReportTable:
    """Return the redemptions of a merchant.

    Raises OSError, and DATABASE_UNAVAILABLE.
    """

    async def work(database: Database) -> ReportTable:
        scope = RedemptionScope(
            query.merchant_id, query.store_id, query.first_day, query.last_day, time_zone=query.time_zone
        )
        reporter = RedemptionReporter(database, ProgramTransactions(database))
        return redemption_table(await reporter.run(scope, system_clock()), query.time_zone)

    return await _with_database(url, query, work)


async def report_codes(url: str, query: ReportQuery) -> ReportTable:
    """Return the one-time codes of a merchant.

    Raises OSError, and DATABASE_UNAVAILABLE.
    """

    async def work(database: Database) -> ReportTable:
        scope = CodesScope(query.merchant_id, query.first_day, query.last_day)
        return code_table(await CodeReporter(database).run(scope))

    return await _with_database(url, query, work)


async def _with_database(url: str, query: ReportQuery, work: Callable[[Database], Awaitable[T]]) -> T:
    """Run a function on the database, once its schema and the merchant are checked."""
    await check_migrated(url)
    database = Database(url, pool_size=1)
    try:
        await _check_merchant(database, query)
        return await work(database)
    finally:
        await database.dispose()


async def _check_merchant(database: Database, query: ReportQuery) -> None:
    """Raise OSError unless the merchant has a store, and the store of the query."""
    programs = ProgramTransactions(database)
    if not await programs.list_stores(query.merchant_id, after="", limit=1):
        raise OSError(f"no store is registered for the merchant {query.merchant_id}")
    stores = {query.store_id} - {""}
    own = await database.snapshot(lambda connection: programs.own_stores(connection, query.merchant_id, stores))
    if own != stores:
        raise OSError(f"the merchant {query.merchant_id} has no store {query.store_id}")


async def _find_time_zone(database: Database, query: ReportQuery) -> str:
    """Return the time zone of the merchant's programs.

    With a store, only its programs count. Raises OSError if they have several.
    """
    transactions = ProgramTransactions(database)
    zones: set[str] = set()
    after = 0
    while programs := await transactions.list_programs(query.merchant_id, after=after, limit=PAGE_SIZE):
        after = programs[-1].program_id
        zones |= {
            program.time_zone or DEFAULT_TIME_ZONE
            for program in programs
            if not query.store_id or query.store_id in program.store_ids
        }
    if len(zones) > 1:
        names = ", ".join(sorted(zones))
        raise OSError(f"the programs have several time zones: choose one by --time-zone, such as {names}")
    return zones.pop() if zones else DEFAULT_TIME_ZONE
