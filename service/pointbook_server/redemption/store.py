"""The transactions of redemption: each holds its locks in one order - customer, accounts, redemptions, challenges."""

import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pointbook_server.clock import Clock
from pointbook_server.database import Connection, Database, RetryTransactionError
from pointbook_server.ledger.holds import Hold, released, without
from pointbook_server.ledger.model import Account, AccountKey
from pointbook_server.ledger.posting import Settlement
from pointbook_server.redemption import statements as sql
from pointbook_server.redemption.asking import Ask, Assessment, assess
from pointbook_server.redemption.facts import FactsReader, OpenCustomers, PoolChangedError, Programs
from pointbook_server.redemption.model import Finding, in_order, refusal
from pointbook_server.redemption.pool import draws_of, event_ids_of, points_by_account
from pointbook_server.redemption.redeemed import (
    AccountHold,
    HoldState,
    Order,
    Redemption,
    RedemptionState,
    Reversal,
    already_reversed,
    new_redemption_id,
    redemption_not_found,
    reference_reused,
)

SWEEP_COUNT = 100
"""How many redemptions one transaction releases at most."""
Prove = Callable[[Assessment], Iterable[Finding]]
Consume = Callable[[Connection], Awaitable[None]]


class LedgerBook(Protocol):
    """The part of a merchant's accounts that redemption locks and changes."""

    accounts: dict[AccountKey, Account]
    """Those that are there, once read."""
    holds: dict[AccountKey, tuple[Hold, ...]]
    """The holds of those that have any."""

    async def lock(self, keys: Iterable[AccountKey], *, skip_locked: bool = False) -> None:
        """Lock accounts, and read them as they are under the lock; those that are locked may be left out."""

    async def read(self, keys: Iterable[AccountKey]) -> None:
        """Read accounts without locking them."""

    async def made_at_ms(self, event_ids: Iterable[str]) -> dict[str, int]:
        """Tell when events happened."""

    async def put_holds(self, holds: Mapping[AccountKey, tuple[Hold, ...]]) -> None:
        """Write the holds of locked accounts."""

    async def complete(self, key: AccountKey, account: Account, at_ms: int, *, points: int = 0) -> Account:
        """Read as many lots as it takes to tell what is active at a moment, and to draw so many points."""


OpenLedger = Callable[[Connection, str], LedgerBook]
"""Gives a merchant's accounts on a connection."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which redemptions of a merchant to list; None keeps all."""

    redeemers: tuple[str, ...] | None
    state: RedemptionState | None
    start_ms: int
    end_ms: int


class RedemptionsStore:
    """Reads and writes redemptions, and what they hold of accounts."""

    def __init__(
        self, database: Database, programs: Programs, open_ledger: OpenLedger, open_customers: OpenCustomers
    ) -> None:
        self._database = database
        self._open_ledger = open_ledger
        self._open_customers = open_customers
        self._facts = FactsReader(programs, open_customers)

    async def assess(self, asks: Sequence[Ask], now_ms: int) -> list[Assessment]:
        """Check asks of one merchant, without locking anything."""
        async with self._database.autocommit() as connection:
            ledger = self._open_ledger(connection, asks[0].merchant_id)
            facts = await self._facts.read(connection, ledger, asks, now_ms)
        return [assess(ask, each) for ask, each in zip(asks, facts, strict=True)]

    async def redeem(
        self, order: Order, before: Assessment, prove: Prove, consume: Consume | None, clock: Clock
    ) -> Redemption:
        """Redeem in one transaction, in which everything is read again under locks, and answer what is kept.

        `before` is the assessment that was made without locks; `prove` tells what speaks against how the customer was
        validated, and `consume` uses the code up. Where a redemption of this reference has come between, that one is
        answered. Raises the refusal of what speaks against it, and REFERENCE_REUSED.
        """
        ask, facts = order.ask, before.facts
        pool = facts.account_keys(ask)

        async def work(connection: Connection) -> Redemption:
            if facts.customer is not None:
                await self._open_customers(connection, ask.merchant_id).lock([facts.customer.customer_id])
            ledger = self._open_ledger(connection, ask.merchant_id)
            await ledger.lock(pool)
            try:
                (again,) = await self._facts.read(connection, ledger, [ask], clock(), locked=pool)
            except PoolChangedError as error:
                pool.update(error.keys)
                raise RetryTransactionError from None
            assessment = assess(ask, again)
            if stored := await _by_reference(connection, ask.merchant_id, order.reference):
                return order.checked(stored, assessment)
            if order.content(assessment) != order.content(before):
                raise RetryTransactionError  # The locks, and the code, are for what was asked for before.
            if violations := in_order([*assessment.violations, *prove(assessment)]):
                raise refusal(violations)
            if consume is not None:
                await consume(connection)
            redemption = await _drawn(ledger, order.redemption(assessment, new_redemption_id()), assessment)
            if not await connection.execute(sql.INSERT, sql.write(redemption)):
                raise RetryTransactionError  # Another call has just taken the reference.
            await ledger.put_holds(_held(ledger, redemption, assessment))
            return redemption

        return await self._database.transaction(work)

    async def by_reference(self, merchant_id: str, reference: str) -> Redemption | None:
        """Read the redemption of a reference."""
        async with self._database.autocommit() as connection:
            return await _by_reference(connection, merchant_id, reference)

    async def redemption(self, merchant_id: str, redemption_id: str) -> Redemption:
        """Read a redemption. Raises REDEMPTION_NOT_FOUND."""
        async with self._database.autocommit() as connection:
            named = {"merchant_id": merchant_id, "redemption_id": redemption_id}
            row = await connection.fetch_one(sql.READ_BY_ID, named)
        if row is None:
            raise redemption_not_found(redemption_id)
        return sql.read(row)

    async def redemptions(
        self, merchant_id: str, wanted: Filter, now_ms: int, *, before: tuple[int, str] | None, limit: int
    ) -> list[Redemption]:
        """Read a page of a merchant's redemptions, the newest first, before one of them (time in ms, id)."""
        before_ms, before_id = before or (wanted.end_ms, "")
        values = {
            "merchant_id": merchant_id,
            "redeemers": list(wanted.redeemers or ()),
            "state": "" if wanted.state is None else wanted.state.value,
            "start_ms": wanted.start_ms,
            "end_ms": wanted.end_ms,
            "before_ms": before_ms,
            "before_id": before_id,
            "now_ms": now_ms,
            "limit": limit,
        }
        statement = sql.LIST_OF_MERCHANT if wanted.redeemers is None else sql.LIST_OF_REDEEMER
        async with self._database.autocommit() as connection:
            return [sql.read(row) for row in await connection.fetch(statement, values)]

    async def reverse(self, reversal: Reversal) -> Redemption:
        """Give points of a redemption back, once for a reference, and answer the redemption as it then stands.

        Raises REDEMPTION_NOT_FOUND, REFERENCE_REUSED, ALREADY_REVERSED and REDEMPTION_SETTLED.
        """
        merchant_id = reversal.merchant_id

        async def work(connection: Connection) -> Redemption:
            redemption, ledger = await self._locked(connection, merchant_id, reversal.redemption_id)
            named = {"merchant_id": merchant_id, "reference": reversal.reference}
            if row := await connection.fetch_one(sql.READ_REVERSAL, named):
                if (row.redemption_id, row.points) != (reversal.redemption_id, reversal.points):
                    raise reference_reused(reversal.reference)
                return redemption
            given_back = redemption.give_back(reversal.points)
            values = named | {
                "redemption_id": reversal.redemption_id,
                "points": reversal.points,
                "notes": reversal.notes,
                "now_ms": reversal.at_ms,
            }
            if not await connection.execute(sql.INSERT_REVERSAL, values):
                raise RetryTransactionError  # Another call has just taken the reference.
            await _update(connection, given_back)
            await ledger.put_holds(_reduced(ledger, given_back))
            return given_back

        return await self._database.transaction(work)

    async def settle_by_hand(self, merchant_id: str, redemption_id: str, reason: str, now_ms: int) -> Redemption:
        """Settle what a redemption still holds, or held, as SHOPLINE's webhook would have.

        Raises REDEMPTION_NOT_FOUND, and ALREADY_REVERSED where nothing is left to settle.
        """

        async def work(connection: Connection) -> Redemption:
            redemption, ledger = await self._locked(connection, merchant_id, redemption_id)
            if redemption.reversed_points == redemption.content.points:
                raise already_reversed(redemption)
            keys = [hold.key for hold in redemption.holds]
            settled = redemption.settled(keys)
            if settled == redemption:
                return redemption
            await _update(connection, settled)
            await _tell(connection, redemption, "SETTLE", reason, now_ms)
            await ledger.put_holds(
                {key: without(its_holds, redemption_id) for key, its_holds in ledger.holds.items() if key in keys}
            )
            return settled

        return await self._database.transaction(work)

    async def settle(self, connection: Connection, merchant_id: str, settlements: Sequence[Settlement]) -> None:
        """Settle what SHOPLINE has booked, in the transaction that writes its events, whose accounts are locked."""
        keys: defaultdict[str, list[AccountKey]] = defaultdict(list)
        for settlement in settlements:
            keys[settlement.hold.redemption_id].append(settlement.account)
        named = {"merchant_id": merchant_id, "redemption_ids": sorted(keys)}
        for redemption in map(sql.read, await connection.fetch(sql.LOCK, named)):
            await _update(connection, redemption.settled(keys[redemption.redemption_id]))

    async def overdue_merchants(self, now_ms: int) -> list[str]:
        """Tell merchants with redemptions that SHOPLINE has not booked in time, without locking anything."""
        async with self._database.autocommit() as connection:
            values = {"now_ms": now_ms, "limit": SWEEP_COUNT}
            return [row.merchant_id for row in await connection.fetch(sql.LIST_OVERDUE_MERCHANTS, values)]

    async def release_overdue(self, merchant_id: str, now_ms: int) -> int:
        """Release what a merchant's redemptions hold that SHOPLINE has not booked in time; tells how many there were.

        Accounts that somebody works on are left for the next time, so that several servers do not wait for each other.
        """

        async def work(connection: Connection) -> int:
            values = {"merchant_id": merchant_id, "now_ms": now_ms, "limit": SWEEP_COUNT}
            overdue = [sql.read(row) for row in await connection.fetch(sql.FIND_OVERDUE, values)]
            ledger = self._open_ledger(connection, merchant_id)
            await ledger.lock({hold.key for redemption in overdue for hold in redemption.holds}, skip_locked=True)
            free = [
                redemption.redemption_id
                for redemption in overdue
                if all(hold.key in ledger.accounts for hold in redemption.holds)
            ]
            named = {"merchant_id": merchant_id, "redemption_ids": sorted(free)}
            count = 0
            for redemption in map(sql.read, await connection.fetch(sql.LOCK_FREE, named)):
                if redemption.held(HoldState.OPEN):
                    await _update(connection, redemption.released())
                    await _tell(connection, redemption, "RELEASE", "not booked in time", now_ms)
                    count += 1
            await ledger.put_holds({key: released(holds, now_ms) for key, holds in ledger.holds.items()})
            return count

        return await self._database.transaction(work)

    async def _locked(
        self, connection: Connection, merchant_id: str, redemption_id: str
    ) -> tuple[Redemption, LedgerBook]:
        """Lock a redemption behind the accounts that it holds. Which these are never changes."""
        named = {"merchant_id": merchant_id, "redemption_id": redemption_id}
        row = await connection.fetch_one(sql.READ_BY_ID, named)
        if row is None:
            raise redemption_not_found(redemption_id)
        ledger = self._open_ledger(connection, merchant_id)
        await ledger.lock({hold.key for hold in sql.read(row).holds})
        (row,) = await connection.fetch(sql.LOCK, {"merchant_id": merchant_id, "redemption_ids": [redemption_id]})
        return sql.read(row), ledger


async def _by_reference(connection: Connection, merchant_id: str, reference: str) -> Redemption | None:
    row = await connection.fetch_one(sql.READ_BY_REFERENCE, {"merchant_id": merchant_id, "reference": reference})
    return None if row is None else sql.read(row)


async def _drawn(ledger: LedgerBook, redemption: Redemption, assessment: Assessment) -> Redemption:
    """Tell a redemption with what it draws, and so holds."""
    facts, points = assessment.facts, assessment.points
    accounts = {
        source.key: await ledger.complete(source.key, facts.accounts[source.key], facts.now_ms, points=points)
        for source in assessment.sources
        if source.key in facts.accounts
    }
    made_at_ms = await ledger.made_at_ms(event_ids_of(accounts.values())) if len(accounts) > 1 else {}
    draws = draws_of(points, assessment.sources, accounts, made_at_ms, facts.now_ms)
    holds = tuple(AccountHold(*key, points, HoldState.OPEN) for key, points in points_by_account(draws).items())
    return replace(redemption, draws=tuple(draws), holds=holds)


def _held(ledger: LedgerBook, redemption: Redemption, assessment: Assessment) -> dict[AccountKey, tuple[Hold, ...]]:
    """Tell the holds of the accounts that a new redemption draws on."""
    program = assessment.facts.program
    scenes = () if program is None else program.settlement_scenes
    name, opened_at_ms, settle_by_ms = redemption.redemption_id, redemption.created_at_ms, redemption.settle_by_ms
    return {
        hold.key: (*ledger.holds.get(hold.key, ()), Hold(name, hold.points, opened_at_ms, settle_by_ms, scenes))
        for hold in redemption.holds
    }


def _reduced(ledger: LedgerBook, redemption: Redemption) -> dict[AccountKey, tuple[Hold, ...]]:
    """Tell the holds of the accounts of a redemption that was reversed."""
    points = {hold.key: hold.points for hold in redemption.holds}
    return {
        key: tuple(
            hold._replace(points=points[key]) if hold.redemption_id == redemption.redemption_id else hold
            for hold in holds
            if hold.redemption_id != redemption.redemption_id or points[key]
        )
        for key, holds in ledger.holds.items()
    }


async def _update(connection: Connection, redemption: Redemption) -> None:
    named = {"merchant_id": redemption.merchant_id, "redemption_id": redemption.redemption_id}
    await connection.execute(sql.UPDATE, named | sql.write_changing(redemption))


async def _tell(connection: Connection, redemption: Redemption, action: str, reason: str, now_ms: int) -> None:
    values = {
        "audit_id": secrets.token_hex(8),
        "merchant_id": redemption.merchant_id,
        "redemption_id": redemption.redemption_id,
        "action": action,
        "reason": reason,
        "now_ms": now_ms,
    }
    await connection.execute(sql.INSERT_AUDIT, values)
