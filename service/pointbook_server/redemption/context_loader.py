"""What there is to an ask, read from the rooms that keep it: programs, customers, groups, accounts, redemptions.

However many asks of a merchant there are, most take three statements: programs, customers, accounts. Decreases are
looked for only in accounts whose newest entry is not older than the program's settlement lead.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from pointbook_server.customers.model import Customer, CustomerKey, GroupKey, Identifier, UserGroup
from pointbook_server.customers.rules import normalize_identifier
from pointbook_server.db.database import Connection
from pointbook_server.ledger.holds import Hold
from pointbook_server.ledger.model import Account, AccountKey, Expiry
from pointbook_server.programs.model import DEFAULT_TIME_ZONE, Program
from pointbook_server.redemption import queries
from pointbook_server.redemption.assessment import (
    GroupRef,
    RedemptionContext,
    RedemptionRequest,
    own_sources,
    requested_points,
    sources_of,
)
from pointbook_server.redemption.bookings import lead_ms_of, scenes_of
from pointbook_server.redemption.cap_windows import windows_at
from pointbook_server.redemption.rules import Usage, Violation

NO_USAGE = Usage()
BOOKINGS_MAX = 100
"""How many decreases of one size are read of an account at most: as many redemptions as share a transaction."""


class CustomerRepository(Protocol):
    """The part of a merchant's customers that redemption reads."""

    async def find_all(self, keys: Collection[CustomerKey]) -> dict[CustomerKey, Customer]:
        """Read the customers whom keys belong to."""

    async def find_group(self, by: GroupKey, key: str) -> UserGroup | None:
        """Read a group with its members and their buyers."""

    async def find_groups(self, group_ids: Collection[str]) -> dict[str, UserGroup]:
        """Return groups by their ids, with their members and their buyers."""

    async def lock(self, customer_ids: Iterable[str]) -> set[str]:
        """Lock customers in the order that everybody keeps to."""


OpenCustomers = Callable[[Connection, str], CustomerRepository]
"""Gives a merchant's customers on a connection."""


class Programs(Protocol):
    """Where programs and stores are kept."""

    async def read(self, connection: Connection, merchant_id: str, program_ids: Collection[int]) -> dict[int, Program]:
        """Read programs, as far as the merchant has them."""

    async def read_cross_program(self, connection: Connection, merchant_id: str) -> list[Program]:
        """Read the merchant's programs that let their points be redeemed in others."""

    async def own_stores(self, connection: Connection, merchant_id: str, store_ids: Collection[str]) -> set[str]:
        """Tell which stores are the merchant's."""


class AccountRepository(Protocol):
    """The part of a merchant's accounts that redemption reads, locks and changes."""

    accounts: dict[AccountKey, Account]
    """Those that are there, once read."""
    holds: dict[AccountKey, tuple[Hold, ...]]
    """The holds of those that have any."""

    async def read(self, keys: Iterable[AccountKey]) -> None:
        """Read accounts without locking them."""

    async def lock(self, keys: Iterable[AccountKey], *, skip_locked: bool = False) -> None:
        """Lock accounts, and read them as they are under the lock; those that are locked may be left out."""

    async def complete(self, key: AccountKey, account: Account, at_ms: int, *, points: int = 0) -> Account:
        """Read as many lots as it takes to tell what is active at a moment, and to draw so many points."""

    async def next_expiry(self, key: AccountKey, account: Account, at_ms: int) -> Expiry | None:
        """Read what of an account expires soonest after a moment."""

    async def made_at_ms(self, event_ids: Iterable[str]) -> dict[str, int]:
        """Tell when events happened."""

    async def put_holds(self, holds: Mapping[AccountKey, tuple[Hold, ...]]) -> None:
        """Write the holds of locked accounts."""

    async def settle(self, event_id: str, redemption_id: str, settled_redemption_id: str) -> None:
        """Record that an entry of a locked account settled a redemption, in place of another one, empty for none."""


OpenLedger = Callable[[Connection, str], AccountRepository]
"""Gives a merchant's accounts on a connection."""


class PoolChangedError(Exception):
    """An ask draws on accounts that are not locked."""

    def __init__(self, keys: Collection[AccountKey]) -> None:
        super().__init__("the pool has changed")
        self.keys = frozenset(keys)


class ContextLoader:
    """Reads the facts of asks of one merchant on one connection.

    With `locked` accounts no others may be drawn on: raises PoolChangedError where an ask would.
    """

    def __init__(self, programs: Programs, open_customers: OpenCustomers) -> None:
        self._programs = programs
        self._open_customers = open_customers

    async def read(
        self,
        connection: Connection,
        ledger: AccountRepository,
        asks: Sequence[RedemptionRequest],
        now_ms: int,
        *,
        locked: Collection[AccountKey] | None = None,
    ) -> list[RedemptionContext]:
        """Read the facts of each ask."""
        merchant_id = asks[0].merchant_id
        named = await self._programs.read(connection, merchant_id, {ask.program_id for ask in asks})
        allowing = await self._allowing(connection, merchant_id, asks, named)
        customers = self._open_customers(connection, merchant_id)
        keys = [ask.key_in(named.get(ask.program_id)) for ask in asks]
        found = await customers.find_all({key for key in keys if key is not None})
        accounts: dict[AccountKey, Account] = {}
        facts = []
        for ask, key in zip(asks, keys, strict=True):
            program = named.get(ask.program_id)
            customer = None if key is None else found.get(key)
            chosen = await _groups(customers, ask.group, customer, program)
            group = chosen[0] if chosen else None
            others = _others(ask, program, allowing)
            programs = () if program is None else (program, *others)
            facts.append(
                RedemptionContext(
                    now_ms=now_ms,
                    program=program,
                    others=others,
                    key=key,
                    customer=customer,
                    is_shop=True,
                    group=group,
                    one_group=len({None if group is None else group.group_id for group in chosen}) <= 1,
                    sources=sources_of(ask, programs, own_sources(key, customer), group),
                    accounts=accounts,
                    usage=NO_USAGE,
                )
            )
        accounts |= await _accounts(ledger, facts, now_ms, locked)
        facts = await self._with_shops(connection, merchant_id, facts)
        facts = await _with_bookings(connection, merchant_id, asks, facts)
        return await _with_usage(connection, merchant_id, facts)

    async def _allowing(
        self, connection: Connection, merchant_id: str, asks: Sequence[RedemptionRequest], named: Mapping[int, Program]
    ) -> list[Program]:
        asked = (named.get(ask.program_id) for ask in asks if ask.group_redemption)
        if any(program is not None and program.allow_cross_program_redemption for program in asked):
            return await self._programs.read_cross_program(connection, merchant_id)
        return []

    async def _with_shops(
        self, connection: Connection, merchant_id: str, facts: Sequence[RedemptionContext]
    ) -> list[RedemptionContext]:
        """Tell which buyers without an account are of a store of the merchant at all."""
        unknown = {
            each.key.store_id
            for each in facts
            if each.customer is None and isinstance(each.key, AccountKey) and each.key not in each.accounts
        }
        if not unknown:
            return list(facts)
        own = await self._programs.own_stores(connection, merchant_id, unknown)
        return [
            replace(each, is_shop=not isinstance(each.key, AccountKey) or each.key.store_id not in unknown - own)
            for each in facts
        ]


def _others(ask: RedemptionRequest, program: Program | None, allowing: Sequence[Program]) -> tuple[Program, ...]:
    if program is None or not ask.group_redemption or not program.allow_cross_program_redemption:
        return ()
    return tuple(other for other in allowing if other.program_id != program.program_id)


async def _groups(
    customers: CustomerRepository, wanted: GroupRef | None, customer: Customer | None, program: Program | None
) -> list[UserGroup | None]:
    """Read what each selector chooses."""
    if wanted is None:
        return []
    chosen = [await customers.find_group(by, key) for by, key in wanted.keys]
    if wanted.primary is not None:
        primary = await _customer_id(customers, wanted.primary, program)
        chosen.append(None if primary is None else await customers.find_group(GroupKey.PRIMARY_CUSTOMER, primary))
    if wanted.use_default:
        known = None if customer is None else customer.customer_id
        chosen.append(None if known is None else await customers.find_group(GroupKey.DEFAULT_OF_CUSTOMER, known))
    return chosen


async def _customer_id(customers: CustomerRepository, identifier: Identifier, program: Program | None) -> str | None:
    value = normalize_identifier(identifier.kind, identifier.value, "" if program is None else program.default_region)
    if value is None:
        return None
    key = replace(identifier, value=value)
    found = (await customers.find_all([key])).get(key)
    return None if found is None else found.customer_id


async def _accounts(
    ledger: AccountRepository, facts: Iterable[RedemptionContext], now_ms: int, locked: Collection[AccountKey] | None
) -> dict[AccountKey, Account]:
    """Read every account that counts, so that it can tell what is active."""
    keys = {key for each in facts for key in each.account_keys}
    if locked is None:
        await ledger.read(keys)
    elif missing := keys.difference(locked):
        raise PoolChangedError(missing)
    return {key: await ledger.complete(key, account, now_ms) for key, account in ledger.accounts.items() if key in keys}


async def _with_bookings(
    connection: Connection, merchant_id: str, asks: Sequence[RedemptionRequest], facts: Sequence[RedemptionContext]
) -> list[RedemptionContext]:
    """Read the decreases by which SHOPLINE may have booked already what is asked for."""
    places = {place for ask, each in zip(asks, facts, strict=True) for place in _booking_places(ask, each)}
    if not places:
        return list(facts)
    names = ("store_ids", "buyer_ids", "points", "since_ms")
    columns = dict(zip(names, map(list, zip(*sorted(places), strict=True)), strict=True))
    scenes = {scene for each in facts if each.program is not None for scene in scenes_of(each.program)}
    values = {"merchant_id": merchant_id, "scenes": sorted(scenes), "limit": BOOKINGS_MAX, **columns}
    bookings = tuple(map(queries.read_booking, await connection.fetch(queries.FIND_BOOKINGS, values)))
    return [replace(each, bookings=bookings) for each in facts]


def _booking_places(ask: RedemptionRequest, facts: RedemptionContext) -> Iterator[tuple[str, str, int, int]]:
    """Yield where an ask may have been booked: in which account, by how many points, and since when."""
    program = facts.program
    points = 0 if program is None else requested_points(ask, program)
    if program is None or isinstance(points, Violation) or points <= 0:
        return
    since_ms = facts.now_ms - lead_ms_of(program)
    for source in facts.sources:
        account = facts.accounts.get(source.key)
        if account is not None and not account.is_before(since_ms):
            yield (*source.key, points, since_ms)


async def _with_usage(
    connection: Connection, merchant_id: str, facts: Sequence[RedemptionContext]
) -> list[RedemptionContext]:
    """Read what the redeemers whose program has caps have redeemed."""
    rows: dict[tuple[str, int], tuple[int, int, int]] = {}
    for each in facts:
        if each.program is not None and _has_caps(each.program):
            windows = windows_at(each.now_ms, each.program.time_zone or DEFAULT_TIME_ZONE)
            rows |= {(name, each.program.program_id): windows for name in each.redeemers}
    if not rows:
        return list(facts)
    arrays = list(zip(*((*key, *windows) for key, windows in sorted(rows.items())), strict=True))
    names = ("redeemers", "program_ids", "days", "weeks", "months")
    values = dict(zip(names, map(list, arrays), strict=True))
    read = await connection.fetch(queries.READ_USAGE, {"merchant_id": merchant_id, **values})
    used = {(row.redeemer, row.program_id): (row.day_points, row.week_points, row.month_points) for row in read}
    return [replace(each, usage=_usage(each, used)) for each in facts]


def _usage(facts: RedemptionContext, used: Mapping[tuple[str, int], tuple[int, int, int]]) -> Usage:
    program_id = 0 if facts.program is None else facts.program.program_id
    found = [used.get((name, program_id), (0, 0, 0)) for name in facts.redeemers]
    return Usage(*map(sum, zip(*found, strict=True))) if found else Usage()


def _has_caps(program: Program) -> bool:
    criteria = program.criteria
    caps = (criteria.max_points_per_day, criteria.max_points_per_week, criteria.max_points_per_month)
    return any(cap is not None for cap in caps)
