"""The loader of the contexts in which requests are assessed.

Most batches of a merchant's requests take three statements, regardless of their size: programs, customers, accounts.
Bookings are searched only in accounts whose newest entry is not older than the program's settlement lead.
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
    redeemable_sources,
    requested_points,
)
from pointbook_server.redemption.bookings import settlement_lead_ms, settlement_scenes
from pointbook_server.redemption.caps import NO_USAGE, CapWindows, Usage, cap_windows_at, has_caps
from pointbook_server.redemption.violations import Violation

BOOKINGS_MAX = 100
"""The most decreases by one number of points to read of an account: as many as redemptions in a transaction."""


class CustomerRepository(Protocol):
    """The part of a merchant's customers that redemption reads."""

    async def find_all(self, keys: Collection[CustomerKey]) -> dict[CustomerKey, Customer]:
        """Return the customers that keys belong to."""

    async def find_group(self, by: GroupKey, key: str) -> UserGroup | None:
        """Return a group with its members and their buyers; None if there is none."""

    async def find_groups(self, group_ids: Collection[str]) -> dict[str, UserGroup]:
        """Return groups by their ids, with their members and their buyers."""

    async def lock(self, customer_ids: Iterable[str]) -> set[str]:
        """Lock customers in sorted order, and return the ids of those that exist."""


OpenCustomers = Callable[[Connection, str], CustomerRepository]
"""Opens a merchant's customers on a connection."""


class Programs(Protocol):
    """The part of programs and stores that redemption reads."""

    async def read(self, connection: Connection, merchant_id: str, program_ids: Collection[int]) -> dict[int, Program]:
        """Return those of the programs that the merchant has."""

    async def read_cross_program(self, connection: Connection, merchant_id: str) -> list[Program]:
        """Return the merchant's programs whose points may be redeemed in other programs."""

    async def own_stores(self, connection: Connection, merchant_id: str, store_ids: Collection[str]) -> set[str]:
        """Return those of the stores that are the merchant's."""


class AccountRepository(Protocol):
    """The part of a merchant's accounts that redemption reads, locks and changes."""

    accounts: dict[AccountKey, Account]
    """The accounts read so far that exist."""
    holds: dict[AccountKey, tuple[Hold, ...]]
    """The holds of the accounts that have any."""

    async def read(self, keys: Iterable[AccountKey]) -> None:
        """Read accounts without locks."""

    async def lock(self, keys: Iterable[AccountKey], *, skip_locked: bool = False) -> None:
        """Lock accounts and read them; `skip_locked` leaves out locked ones."""

    async def load_lots(self, key: AccountKey, account: Account, at_ms: int, *, points: int = 0) -> Account:
        """Return an account with enough lots for its active points, and to draw `points`."""

    async def next_expiry(self, key: AccountKey, account: Account, at_ms: int) -> Expiry | None:
        """Return the soonest expiry of an account after a time; None if nothing expires."""

    async def find_event_times(self, event_ids: Iterable[str]) -> dict[str, int]:
        """Return the times of events."""

    async def write_holds(self, holds: Mapping[AccountKey, tuple[Hold, ...]]) -> None:
        """Write the holds of locked accounts. `accounts` then has them."""

    async def record_settlement(self, event_id: str, redemption_id: str, settled_redemption_id: str) -> None:
        """Record that an entry settled a redemption.

        `settled_redemption_id` is the redemption that it has settled so far; empty for none.
        """


OpenLedger = Callable[[Connection, str], AccountRepository]
"""Opens a merchant's accounts on a connection."""


class AccountsNotLockedError(Exception):
    """A request draws on accounts that are not locked."""

    def __init__(self, keys: Collection[AccountKey]) -> None:
        super().__init__("a request draws on accounts that are not locked")
        self.keys = frozenset(keys)


class ContextLoader:
    """A loader of the contexts of one merchant's requests."""

    def __init__(self, programs: Programs, open_customers: OpenCustomers) -> None:
        self._programs = programs
        self._open_customers = open_customers

    async def load(
        self,
        connection: Connection,
        ledger: AccountRepository,
        requests: Sequence[RedemptionRequest],
        now_ms: int,
        *,
        locked: Collection[AccountKey] | None = None,
    ) -> list[RedemptionContext]:
        """Return the context of each request.

        With `locked`, the accounts must be among these: raises AccountsNotLockedError if a request needs another.
        """
        merchant_id = requests[0].merchant_id
        requested = await self._programs.read(connection, merchant_id, {request.program_id for request in requests})
        cross_programs = await self._load_cross_programs(connection, merchant_id, requests, requested)
        customers = self._open_customers(connection, merchant_id)
        keys = [request.normalised_key(requested.get(request.program_id)) for request in requests]
        found = await customers.find_all({key for key in keys if key is not None})
        accounts: dict[AccountKey, Account] = {}
        contexts = []
        for request, key in zip(requests, keys, strict=True):
            program = requested.get(request.program_id)
            customer = None if key is None else found.get(key)
            others = _other_programs(request, program, cross_programs) if cross_programs else ()
            programs = () if program is None else (program, *others)
            own = own_sources(key, customer)
            if request.group is None:
                sources = redeemable_sources(request, programs, own, None)
                contexts.append(RedemptionContext(now_ms, program, key, customer, own, sources, accounts, others))
                continue
            selected = await _select_groups(customers, request.group, customer, program)
            group = selected[0] if selected else None
            sources = redeemable_sources(request, programs, own, group)
            contexts.append(
                RedemptionContext(
                    now_ms,
                    program,
                    key,
                    customer,
                    own,
                    sources,
                    accounts,
                    others,
                    group,
                    selects_one_group=len({None if group is None else group.group_id for group in selected}) <= 1,
                )
            )
        accounts |= await _load_accounts(ledger, contexts, now_ms, locked)
        contexts = await self._with_stores(connection, merchant_id, contexts)
        contexts = await _with_bookings(connection, merchant_id, requests, contexts)
        return await _with_usage(connection, merchant_id, contexts)

    async def _load_cross_programs(
        self,
        connection: Connection,
        merchant_id: str,
        requests: Sequence[RedemptionRequest],
        requested: Mapping[int, Program],
    ) -> list[Program]:
        """Return the merchant's cross-program programs if a request may draw on them."""
        crossing = (requested.get(request.program_id) for request in requests if request.group_redemption)
        if any(program is not None and program.allow_cross_program_redemption for program in crossing):
            return await self._programs.read_cross_program(connection, merchant_id)
        return []

    async def _with_stores(
        self, connection: Connection, merchant_id: str, contexts: list[RedemptionContext]
    ) -> list[RedemptionContext]:
        """Return the contexts, with `is_own_store` set for unregistered buyers."""
        unknown = {
            context.key.store_id
            for context in contexts
            if context.customer is None and context.key not in context.accounts and isinstance(context.key, AccountKey)
        }
        if not unknown:
            return contexts
        foreign = unknown - await self._programs.own_stores(connection, merchant_id, unknown)
        return [
            context._replace(
                is_own_store=not isinstance(context.key, AccountKey) or context.key.store_id not in foreign
            )
            for context in contexts
        ]


def _other_programs(
    request: RedemptionRequest, program: Program | None, cross_programs: Sequence[Program]
) -> tuple[Program, ...]:
    if program is None or not request.group_redemption or not program.allow_cross_program_redemption:
        return ()
    return tuple(other for other in cross_programs if other.program_id != program.program_id)


async def _select_groups(
    customers: CustomerRepository, selectors: GroupRef, customer: Customer | None, program: Program | None
) -> list[UserGroup | None]:
    """Return the group that each selector selects."""
    selected = [await customers.find_group(by, key) for by, key in selectors.keys]
    if selectors.primary is not None:
        primary_id = await _find_customer_id(customers, selectors.primary, program)
        selected.append(
            None if primary_id is None else await customers.find_group(GroupKey.PRIMARY_CUSTOMER, primary_id)
        )
    if selectors.use_default:
        customer_id = None if customer is None else customer.customer_id
        selected.append(
            None if customer_id is None else await customers.find_group(GroupKey.DEFAULT_OF_CUSTOMER, customer_id)
        )
    return selected


async def _find_customer_id(
    customers: CustomerRepository, identifier: Identifier, program: Program | None
) -> str | None:
    value = normalize_identifier(identifier.kind, identifier.value, "" if program is None else program.default_region)
    if value is None:
        return None
    key = replace(identifier, value=value)
    customer = (await customers.find_all([key])).get(key)
    return None if customer is None else customer.customer_id


async def _load_accounts(
    ledger: AccountRepository,
    contexts: Iterable[RedemptionContext],
    now_ms: int,
    locked: Collection[AccountKey] | None,
) -> dict[AccountKey, Account]:
    """Return the accounts of all contexts, with enough lots for active points."""
    keys = {source.key for context in contexts for source in (*context.sources, *context.own)}
    if locked is None:
        await ledger.read(keys)
    elif missing := keys.difference(locked):
        raise AccountsNotLockedError(missing)
    return {
        key: account if account.overflow is None else await ledger.load_lots(key, account, now_ms)
        for key, account in ledger.accounts.items()
        if key in keys
    }


async def _with_bookings(
    connection: Connection,
    merchant_id: str,
    requests: Sequence[RedemptionRequest],
    contexts: list[RedemptionContext],
) -> list[RedemptionContext]:
    """Return the contexts with the possible bookings of their requests."""
    searches = {
        search
        for request, context in zip(requests, contexts, strict=True)
        for search in _booking_searches(request, context)
    }
    if not searches:
        return contexts
    names = ("store_ids", "buyer_ids", "points", "since_ms")
    columns = dict(zip(names, map(list, zip(*sorted(searches), strict=True)), strict=True))
    scenes = {
        scene for context in contexts if context.program is not None for scene in settlement_scenes(context.program)
    }
    params = {"merchant_id": merchant_id, "scenes": sorted(scenes), "limit": BOOKINGS_MAX, **columns}
    bookings = tuple(map(queries.read_booking, await connection.fetch(queries.FIND_BOOKINGS, params)))
    return [context._replace(bookings=bookings) for context in contexts]


def _booking_searches(request: RedemptionRequest, context: RedemptionContext) -> Iterator[tuple[str, str, int, int]]:
    """Yield (store, buyer, points, earliest time) of a request's possible bookings."""
    program = context.program
    points = 0 if program is None else requested_points(request, program)
    if program is None or isinstance(points, Violation) or points <= 0:
        return
    since_ms = context.now_ms - settlement_lead_ms(program)
    for source in context.sources:
        account = context.accounts.get(source.key)
        if account is not None and not account.is_before(since_ms):
            yield (*source.key, points, since_ms)


async def _with_usage(
    connection: Connection, merchant_id: str, contexts: list[RedemptionContext]
) -> list[RedemptionContext]:
    """Return the contexts with the usage of redeemers whose program has caps."""
    windows: dict[tuple[str, int], CapWindows] = {}
    for context in contexts:
        program = context.program
        if program is not None and has_caps(program):
            program_windows = cap_windows_at(context.now_ms, program.time_zone or DEFAULT_TIME_ZONE)
            windows |= {(name, program.program_id): program_windows for name in context.redeemers}
    if not windows:
        return contexts
    columns = zip(*((*key, *starts) for key, starts in sorted(windows.items())), strict=True)
    names = ("redeemers", "program_ids", "days", "weeks", "months")
    params = {"merchant_id": merchant_id, **dict(zip(names, map(list, columns), strict=True))}
    rows = await connection.fetch(queries.READ_USAGE, params)
    used = {(row.redeemer, row.program_id): (row.day_points, row.week_points, row.month_points) for row in rows}
    return [context._replace(usage=_sum_usage(context, used)) for context in contexts]


def _sum_usage(context: RedemptionContext, used: Mapping[tuple[str, int], tuple[int, int, int]]) -> Usage:
    """Return the total usage of all names of a redeemer."""
    program_id = 0 if context.program is None else context.program.program_id
    parts = [used.get((name, program_id), (0, 0, 0)) for name in context.redeemers]
    return Usage(*map(sum, zip(*parts, strict=True))) if parts else NO_USAGE
