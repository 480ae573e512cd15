"""Reports on the points of a merchant, for operators.

Accounts are read with the same rows and rules as calls read them, so that the sums are those of GetPointsAccount.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from pointbook_server.calendars import Calendar
from pointbook_server.db.database import LIFT_TIME_LIMIT, Connection, Database
from pointbook_server.ledger import report_queries, rows
from pointbook_server.ledger.lots import NEVER_MS, Lot
from pointbook_server.ledger.model import Account, AccountKey
from pointbook_server.ledger.scenes import EXPIRED_SCENE, REFUND_SCENES

NEVER = "never"
"""The expiry month of points that never expire; it sorts after all months."""


@dataclass(frozen=True, slots=True)
class PointsScope:
    """A merchant, one of its stores or all (empty), and a period of events.

    The period includes `start_ms` and excludes `end_ms`; None does not bound it.
    """

    merchant_id: str
    store_id: str = ""
    start_ms: int | None = None
    end_ms: int | None = None


@dataclass(slots=True)
class OutstandingPoints:
    """Unexpired points that expire in the same month, and the accounts that have them."""

    points: int = 0
    unheld: int = 0
    accounts: int = 0


@dataclass(slots=True)
class PointsFlow:
    """How events changed balances.

    `spent` includes `redeemed`, the decreases that settled a redemption. `opened` are balances from before the first
    events of accounts. `expired` were deducted by SHOPLINE's events, `silently_expired` without one.
    """

    opened: int = 0
    earned: int = 0
    refunded: int = 0
    spent: int = 0
    redeemed: int = 0
    expired: int = 0
    silently_expired: int = 0
    drift: int = 0

    @property
    def change(self) -> int:
        """The change of the balances."""
        added = self.opened + self.earned + self.refunded + self.drift
        return added - self.spent - self.expired - self.silently_expired


@dataclass(slots=True)
class PointsReport:
    """The points of some accounts now, and how they changed in a period.

    `expired` points are still part of the balance. `outstanding` is by the month of expiry, in order.
    """

    accounts: int = 0
    balance: int = 0
    active: int = 0
    held: int = 0
    holding_accounts: int = 0
    expired: int = 0
    expired_accounts: int = 0
    negative_accounts: int = 0
    negative_balance: int = 0
    drifting_accounts: int = 0
    drift: int = 0
    outstanding: dict[str, OutstandingPoints] = field(default_factory=dict)
    start_balance: int = 0
    end_balance: int = 0
    flow: PointsFlow = field(default_factory=PointsFlow)

    def add(self, account: Account, now_ms: int, calendar: Calendar) -> None:
        """Add an account with all its lots."""
        points = account.points_at(now_ms)
        self.accounts += 1
        self.balance += account.balance
        self.active += points.active
        self.held += points.held
        self.holding_accounts += points.held > 0
        self.expired += points.expired
        self.expired_accounts += points.expired > 0
        self.negative_accounts += account.balance < 0
        self.negative_balance += min(account.balance, 0)
        self.drifting_accounts += account.drift != 0
        self.drift += account.drift
        unheld = _points_by_month(account.unheld_lots(now_ms), now_ms, calendar)
        for month, month_points in _points_by_month(account.lots, now_ms, calendar).items():
            total = self.outstanding.setdefault(month, OutstandingPoints())
            total.points += month_points
            total.unheld += unheld.get(month, 0)
            total.accounts += 1


class _AccountLots(NamedTuple):
    """Looks up the overflow lots of accounts."""

    connection: Connection
    merchant_id: str

    async def load(self, key: AccountKey, account: Account) -> Account:
        """Return an account with its overflow lots, those of the same expiry as one."""
        overflow = account.overflow
        if overflow is None:
            return account
        params = {
            "merchant_id": self.merchant_id,
            **key._asdict(),
            "first_event_id": overflow.first_event_id,
            "first_expires_at_ms": overflow.first_expiry_or_never_ms,
        }
        lots = [
            Lot(int(row.points), int(row.points), row.expires_at_ms, "")
            for row in await self.connection.fetch(report_queries.SUM_OVERFLOW_BY_EXPIRY, params)
        ]
        never = overflow.points - sum(lot.remaining for lot in lots)
        lots.append(Lot(never, never, None, ""))
        return replace(account, lots=(*account.lots, *(lot for lot in lots if lot.remaining)), overflow=None)


class LedgerReporter:
    """A reporter on accounts and entries, which may run while the service writes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, scope: PointsScope, calendar: Calendar, now_ms: int) -> PointsReport:
        """Return the report on one snapshot, with only one account in memory at a time.

        Raises DATABASE_UNAVAILABLE.
        """

        async def work(connection: Connection) -> PointsReport:
            await connection.execute(LIFT_TIME_LIMIT)
            report = PointsReport()
            params = {"merchant_id": scope.merchant_id, "store_id": scope.store_id}
            account_lots = _AccountLots(connection, scope.merchant_id)
            async for row in connection.stream(report_queries.STREAM_ACCOUNTS, params):
                key, account = rows.account_from_row(row)
                report.add(await account_lots.load(key, account), now_ms, calendar)
            report.outstanding = dict(sorted(report.outstanding.items()))
            before, report.flow = await _read_flows(connection, scope)
            report.start_balance = before.change
            report.end_balance = before.change + report.flow.change
            return report

        return await self._database.snapshot(work)


class DriftTotal(NamedTuple):
    """The accounts of all merchants that drift, and the sum of their drift."""

    accounts: int
    points: int
    merchants: int


async def read_drift(connection: Connection) -> DriftTotal:
    """Return how many accounts drift."""
    (row,) = await connection.fetch(report_queries.SUM_DRIFT)
    return DriftTotal(row.accounts, int(row.points), row.merchants)


async def _read_flows(connection: Connection, scope: PointsScope) -> tuple[PointsFlow, PointsFlow]:
    """Return the changes before the period and in it."""
    flows = {period: PointsFlow() for period in range(3)}
    params = {
        "merchant_id": scope.merchant_id,
        "store_id": scope.store_id,
        "start_ms": -NEVER_MS if scope.start_ms is None else scope.start_ms,
        "end_ms": NEVER_MS if scope.end_ms is None else scope.end_ms,
    }
    scenes = {"refund_scenes": sorted(REFUND_SCENES), "expired_scene": EXPIRED_SCENE}
    async for row in connection.stream(report_queries.SUM_ENTRIES, params | scenes):
        for name in _FLOW_COLUMNS:
            setattr(flows[row.period], name, int(row[name] or 0))
    async for row in connection.stream(report_queries.SUM_OPENINGS, params):
        flows[row.period].opened = int(row.opened)
    return flows[0], flows[1]


def _points_by_month(lots: Iterable[Lot], now_ms: int, calendar: Calendar) -> dict[str, int]:
    """Return the unexpired points of lots by the month in which they expire."""
    points: dict[str, int] = {}
    for lot in lots:
        if lot.expiry_or_never_ms > now_ms:
            month = NEVER if lot.expires_at_ms is None else calendar.month(lot.expires_at_ms)
            points[month] = points.get(month, 0) + lot.remaining
    return points


_FLOW_COLUMNS = tuple(column.name for column in fields(PointsFlow) if column.name != "opened")
