"""The shops that the benchmarks run on: how many accounts there are, and what happens in them."""

import secrets
import time
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import asyncpg

HOT_ACCOUNTS = 10
MERCHANTS = 1_000
OPENING_POINTS = 1_000
EVENT_POINTS = 20
OPENED_AT_MS = 1_780_000_000_000
YEAR_MS = 365 * 24 * 60 * 60 * 1_000
LATE_BY_EVENTS = 50
"""How many of its account's events a late one comes before."""

# What the service would have written for one event an account: calling it so often would take minutes.
STORES = """
    INSERT INTO stores (store_id, merchant_id, shop_domain, display_name, revision, updated_at_ms)
    SELECT $1::text || '-' || n, $1::text || '-' || n, '', '', 1, $3
    FROM generate_series(0, $2::int - 1) AS n
"""
ENTRIES = """
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
ACCOUNTS = """
    INSERT INTO points_accounts (merchant_id, store_id, buyer_id, opening, balance, lifetime_points, newest_at_ms, lots)
    SELECT $1::text || '-' || n % $2::int, $1::text || '-' || n % $2::int, $1::text || '-buyer-' || n,
        0, $4::int, $4::int, $5, jsonb_build_array(jsonb_build_array($4::int, $4::int, NULL, 'opening-' || n))
    FROM generate_series(0, $3::int - 1) AS n
"""


class AccountIds(NamedTuple):
    """The ids that name one account."""

    merchant_id: str
    store_id: str
    buyer_id: str


class Happening(NamedTuple):
    """One change of an account, before it is written as a message or as a webhook's body."""

    account: AccountIds
    increases: bool
    balance: int
    updated_at_ms: int

    @property
    def expires_at_ms(self) -> int:
        """When the points expire, if they increase."""
        return self.updated_at_ms + YEAR_MS


@dataclass(frozen=True, slots=True)
class Population:
    """Merchants with one store each, among whom the accounts are dealt out in turn.

    The events of an account are `spacing_ms` apart.
    """

    name: str
    accounts: int
    merchants: int = 1
    spacing_ms: int = 1

    def ids(self, number: int) -> AccountIds:
        """Name the account of a number from 0."""
        shop = f"{self.name}-{number % self.merchants}"
        return AccountIds(shop, shop, f"{self.name}-buyer-{number}")

    async def seed(self, connection: asyncpg.Connection) -> None:
        """Write the stores, and open every account with one event."""
        await connection.execute(STORES, self.name, self.merchants, OPENED_AT_MS)
        for statement in (ENTRIES, ACCOUNTS):
            await connection.execute(statement, self.name, self.merchants, self.accounts, OPENING_POINTS, OPENED_AT_MS)


class History:
    """What happens next in each account of a population.

    Every account gains points and spends them again in turn, at times of its own that only grow, and with SHOPLINE's
    balance: so an event that overtakes another one is late, as it would be in life, and lots do not pile up.
    """

    def __init__(self, population: Population) -> None:
        self._population = population
        self._counts: Counter[int] = Counter()
        self._late_counts: Counter[int] = Counter()
        self._began_at_ms = time.time_ns() // 1_000_000

    def next(self, number: int) -> Happening:
        """Let the next thing happen in the account of a number."""
        count = self._counts[number]
        self._counts[number] = count + 1
        return self._happening(number, count, count * self._population.spacing_ms)

    def late(self, number: int) -> Happening:
        """Let it be told only now what happened before the newest events of the account of a number.

        All of this happened between the same two events, a millisecond apart: there must be so much room.
        """
        count = self._late_counts[number]
        self._late_counts[number] = count + 1
        later_at_ms = (self._counts[number] - LATE_BY_EVENTS) * self._population.spacing_ms
        return self._happening(number, count, later_at_ms - self._population.spacing_ms + 1 + count)

    def _happening(self, number: int, count: int, after_ms: int) -> Happening:
        increases = count % 2 == 0
        return Happening(
            account=self._population.ids(number),
            increases=increases,
            balance=OPENING_POINTS + EVENT_POINTS if increases else OPENING_POINTS,
            updated_at_ms=self._began_at_ms + after_ms,
        )


def new_event_id() -> str:
    """Make an id as the shim's are: a digest, so that ids come in no order."""
    return f"shopline-{secrets.token_hex(32)}"


@dataclass(frozen=True, slots=True)
class Shops:
    """The populations of a run; the echo's alone is in no database."""

    echo: Population
    book: Population
    hot: Population
    spread: Population
    customers: Population
    redeemers: Population

    @property
    def stored(self) -> tuple[Population, ...]:
        """Those that are in the database."""
        return (self.book, self.hot, self.spread, self.customers, self.redeemers)


def shops_of(*, accounts: int, customers: int) -> Shops:
    """Plan the populations for so many accounts of points, and customers whom codes are sent to."""
    return Shops(
        echo=Population("echo", accounts),
        book=Population("book", accounts),
        hot=Population("hot", HOT_ACCOUNTS),
        spread=Population("spread", accounts, merchants=min(accounts, MERCHANTS)),
        customers=Population("customers", customers),
        # What is held makes an account's events take longer, so that these have accounts of their own.
        redeemers=Population("redeemers", accounts),
    )
