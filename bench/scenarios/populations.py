"""The accounts that the benchmarks use, and the changes of their points."""

import secrets
import time
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import asyncpg

from pointbook_common.durations import DAY_MS

HOT_ACCOUNTS = 10
MERCHANTS = 1_000
OPENING_POINTS = 1_000
EVENT_POINTS = 20
OPENED_AT_MS = 1_780_000_000_000
YEAR_MS = 365 * DAY_MS
LATE_BY_EVENTS = 50
"""The number of its account's events that a late event precedes."""

# What the service would write for one event per account; so many calls would take minutes.
INSERT_STORES = """
    INSERT INTO stores (store_id, merchant_id, shop_domain, display_name, revision, updated_at_ms)
    SELECT $1::text || '-' || n, $1::text || '-' || n, '', '', 1, $3
    FROM generate_series(0, $2::int - 1) AS n
"""
INSERT_ENTRIES = """
    INSERT INTO points_entries (
        event_id, merchant_id, store_id, buyer_id, update_type, scene, updated_value, points_balance, updated_at_ms,
        webhook_id, shop_domain, api_version, received_at_ms, outcome,
        ordinal, balance_before, balance_after, drift, silently_expired, draws
    )
    SELECT
        'opening-' || n, $1::text || '-' || n % $2::int, $1::text || '-' || n % $2::int, $1::text || '-buyer-' || n,
        'INCREASE', 'SUCCESSFUL_REGISTRATION', $4::int, $4::int, $5, '', '', '', $5, 'APPLIED',
        0, 0, $4::int, 0, 0, '[]'
    FROM generate_series(0, $3::int - 1) AS n
"""
INSERT_ACCOUNTS = """
    INSERT INTO points_accounts (merchant_id, store_id, buyer_id, opening, balance, lifetime_points, newest_at_ms, lots)
    SELECT $1::text || '-' || n % $2::int, $1::text || '-' || n % $2::int, $1::text || '-buyer-' || n,
        0, $4::int, $4::int, $5, jsonb_build_array(jsonb_build_array($4::int, $4::int, NULL, 'opening-' || n))
    FROM generate_series(0, $3::int - 1) AS n
"""


class AccountIds(NamedTuple):
    """The ids of one account."""

    merchant_id: str
    store_id: str
    buyer_id: str


class PointsChange(NamedTuple):
    """One change of an account's points, not yet encoded as a message or webhook."""

    account: AccountIds
    is_increase: bool
    balance: int
    updated_at_ms: int

    @property
    def expires_at_ms(self) -> int:
        """The expiry time of an increase."""
        return self.updated_at_ms + YEAR_MS


@dataclass(frozen=True, slots=True)
class Population:
    """Merchants with one store each; accounts are assigned to them in turn.

    The events of an account are `spacing_ms` apart. With `only_gains`, accounts never spend points, so open lots
    accumulate.
    """

    name: str
    accounts: int
    merchants: int = 1
    spacing_ms: int = 1
    only_gains: bool = False

    def ids(self, number: int) -> AccountIds:
        """Return the ids of an account by its number, from 0."""
        shop = f"{self.name}-{number % self.merchants}"
        return AccountIds(shop, shop, f"{self.name}-buyer-{number}")

    async def populate(self, connection: asyncpg.Connection) -> None:
        """Insert the stores, and open every account with one event."""
        await connection.execute(INSERT_STORES, self.name, self.merchants, OPENED_AT_MS)
        for statement in (INSERT_ENTRIES, INSERT_ACCOUNTS):
            await connection.execute(statement, self.name, self.merchants, self.accounts, OPENING_POINTS, OPENED_AT_MS)


class AccountHistories:
    """The changes of each account of a population.

    Every account alternately gains and spends points, or only gains them, at increasing times and with SHOPLINE's
    balance. An event that overtakes another one is late, as in production.
    """

    def __init__(self, population: Population) -> None:
        self._population = population
        self._counts: Counter[int] = Counter()
        self._late_counts: Counter[int] = Counter()
        self._started_at_ms = time.time_ns() // 1_000_000

    def next_change(self, number: int) -> PointsChange:
        """Return the next change of an account."""
        count = self._counts[number]
        self._counts[number] = count + 1
        return self._change(number, count, count * self._population.spacing_ms)

    def late_change(self, number: int) -> PointsChange:
        """Return a change that precedes the newest events of an account.

        All late changes are between the same two events, a millisecond apart, so `spacing_ms` must be large enough.
        """
        count = self._late_counts[number]
        self._late_counts[number] = count + 1
        later_at_ms = (self._counts[number] - LATE_BY_EVENTS) * self._population.spacing_ms
        return self._change(number, count, later_at_ms - self._population.spacing_ms + 1 + count)

    def _change(self, number: int, count: int, after_ms: int) -> PointsChange:
        only_gains = self._population.only_gains
        is_increase = only_gains or count % 2 == 0
        gains = count + 1 if only_gains else int(is_increase)
        return PointsChange(
            account=self._population.ids(number),
            is_increase=is_increase,
            balance=OPENING_POINTS + EVENT_POINTS * gains,
            updated_at_ms=self._started_at_ms + after_ms,
        )


def new_event_id() -> str:
    """Return a random event_id with the form of the shim's, which are digests."""
    return f"shopline-{secrets.token_hex(32)}"


@dataclass(frozen=True, slots=True)
class Populations:
    """The populations of a run; all but the echo's are in the database."""

    echo: Population
    ledger: Population
    hot: Population
    gaining: Population
    spread: Population
    code_receivers: Population
    redeemers: Population

    @property
    def stored(self) -> tuple[Population, ...]:
        """The populations in the database."""
        return (self.ledger, self.hot, self.gaining, self.spread, self.code_receivers, self.redeemers)


def plan_populations(*, accounts: int, code_receivers: int) -> Populations:
    """Return populations of accounts, and of customers who receive codes."""
    return Populations(
        echo=Population("echo", accounts),
        ledger=Population("ledger", accounts),
        hot=Population("hot", HOT_ACCOUNTS),
        gaining=Population("gaining", HOT_ACCOUNTS, only_gains=True),
        spread=Population("spread", accounts, merchants=min(accounts, MERCHANTS)),
        code_receivers=Population("customers", code_receivers),
        # Separate accounts, since holds make an account's events slower.
        redeemers=Population("redeemers", accounts),
    )
