"""The transactions of redemption: each holds its locks in one order - customer, accounts, redemptions, challenges."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from pointbook_server.clock import Clock, time_ordered_id
from pointbook_server.db.database import Connection, Database, RetryTransactionError
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.holds import Hold, released, without
from pointbook_server.ledger.model import Account, AccountKey, Expiry
from pointbook_server.ledger.posting import Settlement
from pointbook_server.programs.model import Program
from pointbook_server.redemption import queries
from pointbook_server.redemption.allocation import Allocation, allocate, event_ids_of
from pointbook_server.redemption.assessment import Assessment, RedemptionContext, RedemptionRequest, assess
from pointbook_server.redemption.bookings import Booking, lead_ms_of
from pointbook_server.redemption.commands import PendingRedemption, RedemptionFilter, Reversal
from pointbook_server.redemption.context_loader import (
    AccountRepository,
    ContextLoader,
    OpenCustomers,
    OpenLedger,
    PoolChangedError,
    Programs,
)
from pointbook_server.redemption.details import DetailsReader
from pointbook_server.redemption.model import (
    AccountHold,
    HoldState,
    Redemption,
    RedemptionDetails,
    already_reversed,
    new_redemption_id,
    redemption_not_found,
    reference_reused,
)
from pointbook_server.redemption.rules import finding, sort_violations, to_error
from pointbook_server.validation_codes.model import Challenge

CHANGED_MEANWHILE = finding(
    Reason.REDEMPTION_FAILED, "The customer, the group or the program has changed in between; ask again."
)
SWEEP_COUNT = 100
"""How many redemptions one transaction releases at most."""


class Codes(Protocol):
    """The part of one-time codes that redemption locks and uses up."""

    async def lock(self, connection: Connection, merchant_id: str, customers: Iterable[str]) -> None:
        """Lock customers' live codes, in the order that everybody keeps to."""

    async def consume(self, connection: Connection, challenge: Challenge, actor: str, now_ms: int) -> bool:
        """Use a code, or a call, up in somebody's transaction; False where another call has, or where it ended."""


class RedemptionTransactions:
    """Reads and writes redemptions, and what they hold of accounts."""

    def __init__(
        self,
        database: Database,
        programs: Programs,
        open_ledger: OpenLedger,
        open_customers: OpenCustomers,
        codes: Codes,
    ) -> None:
        self._database = database
        self._codes = codes
        self._open_ledger = open_ledger
        self._open_customers = open_customers
        self._facts = ContextLoader(programs, open_customers)
        self._details = DetailsReader(programs, open_customers, open_ledger)

    async def assess(self, asks: Sequence[RedemptionRequest], now_ms: int) -> list[Assessment]:
        """Check asks of one merchant, without locking anything."""
        async with self._database.autocommit() as connection:
            ledger = self._open_ledger(connection, asks[0].merchant_id)
            facts = await self._facts.read(connection, ledger, asks, now_ms)
        return [assess(ask, each) for ask, each in zip(asks, facts, strict=True)]

    async def next_expiry(self, merchant_id: str, facts: RedemptionContext) -> Expiry | None:
        """Read what expires soonest in the accounts that may be drawn on, all of them together."""
        keys = {source.key for source in facts.sources} & facts.accounts.keys()
        expiries = []
        async with self._database.autocommit() as connection:
            ledger = self._open_ledger(connection, merchant_id)
            for key in sorted(keys):
                expiry = await ledger.next_expiry(key, facts.accounts[key], facts.now_ms)
                if expiry is not None:
                    expiries.append(expiry)
        if not expiries:
            return None
        soonest_ms = min(expiry.at_ms for expiry in expiries)
        return Expiry(soonest_ms, sum(expiry.points for expiry in expiries if expiry.at_ms == soonest_ms))

    async def redeem(
        self, merchant_id: str, wanted: Sequence[PendingRedemption], clock: Clock
    ) -> list[Redemption | PointbookError]:
        """Redeem orders of one merchant in one transaction, in which everything is read again under locks.

        Each is answered by itself, after all has committed: what is kept under its reference, or REFERENCE_REUSED, or
        the refusal of what speaks against it, or REDEMPTION_FAILED where it has become another order meanwhile.
        """
        asks = [each.order.ask for each in wanted]
        customers = [each.before.facts.customer for each in wanted]
        customer_ids = {customer.customer_id for customer in customers if customer is not None}
        challenged = {each.challenge.purpose.customer for each in wanted if each.challenge is not None}
        pool = {key for each in wanted for key in each.before.facts.account_keys}

        async def work(connection: Connection) -> list[Redemption | PointbookError]:
            if customer_ids:
                await self._open_customers(connection, merchant_id).lock(customer_ids)
            ledger = self._open_ledger(connection, merchant_id)
            await ledger.lock(pool)
            try:
                facts = await self._facts.read(connection, ledger, asks, clock(), locked=pool)
            except PoolChangedError as error:
                pool.update(error.keys)
                raise RetryTransactionError from None
            stored = await _by_references(connection, merchant_id, (each.order.reference for each in wanted))
            if challenged:
                await self._codes.lock(connection, merchant_id, challenged)
            redeeming = _Redeeming(connection, ledger, self._codes, facts[0].accounts, stored)
            answers = [await redeeming.answer(each, its) for each, its in zip(wanted, facts, strict=True)]
            await redeeming.write(merchant_id, facts[0].now_ms)
            return answers

        return await self._database.transaction(work, planned_once=True)

    async def by_reference(self, merchant_id: str, reference: str) -> Redemption | None:
        """Read the redemption of a reference."""
        async with self._database.autocommit() as connection:
            return next(iter(await _by_references(connection, merchant_id, [reference])), None)

    async def redemption(self, merchant_id: str, redemption_id: str, reference: str, now_ms: int) -> RedemptionDetails:
        """Return a redemption by its id, or by its reference where the id is empty. Raises REDEMPTION_NOT_FOUND."""
        async with self._database.autocommit() as connection:
            if redemption_id:
                named = {"merchant_id": merchant_id, "redemption_id": redemption_id}
                found = list(map(queries.read, await connection.fetch(queries.READ_BY_ID, named)))
            else:
                found = await _by_references(connection, merchant_id, [reference])
            if not found:
                raise redemption_not_found(redemption_id)
            (details,) = await self._details.read(connection, merchant_id, found, now_ms)
        return details

    async def redemptions(
        self, merchant_id: str, wanted: RedemptionFilter, now_ms: int, *, before: tuple[int, str] | None, limit: int
    ) -> list[RedemptionDetails]:
        """Return a page of a merchant's redemptions, the newest first, before one of them (time in ms, id)."""
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
        statement = queries.LIST_OF_MERCHANT if wanted.redeemers is None else queries.LIST_OF_REDEEMER
        async with self._database.autocommit() as connection:
            found = list(map(queries.read, await connection.fetch(statement, values)))
            return await self._details.read(connection, merchant_id, found, now_ms)

    async def reverse(self, reversal: Reversal) -> Redemption:
        """Give points of a redemption back, once for a reference, and answer the redemption as it then stands.

        Raises REDEMPTION_NOT_FOUND, REFERENCE_REUSED, ALREADY_REVERSED and REDEMPTION_SETTLED.
        """
        merchant_id = reversal.merchant_id

        async def work(connection: Connection) -> Redemption:
            redemption, ledger = await self._locked(connection, merchant_id, reversal.redemption_id)
            named = {"merchant_id": merchant_id, "reference": reversal.reference}
            if row := await connection.fetch_one(queries.READ_REVERSAL, named):
                if (row.redemption_id, row.points) != (reversal.redemption_id, reversal.points):
                    raise reference_reused(reversal.reference)
                return redemption
            given_back = redemption.give_back(reversal.points)
            values = named | {
                "redemption_id": reversal.redemption_id,
                "points": reversal.points,
                "notes": reversal.notes,
                "now_ms": reversal.at_ms,
                "redeemer": redemption.content.redeemer,
                "reversed_points": given_back.reversed_points - redemption.reversed_points,
                "actor": reversal.actor,
            }
            if not await connection.execute(queries.INSERT_REVERSAL, values):
                raise RetryTransactionError  # Another call has just taken the reference.
            await _update(connection, given_back)
            await ledger.put_holds(_reduced(ledger, given_back))
            return given_back

        return await self._database.transaction(work, planned_once=True)

    async def settle_by_hand(
        self, merchant_id: str, redemption_id: str, reason: str, actor: str, now_ms: int
    ) -> Redemption:
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
            points = redemption.held(HoldState.OPEN, HoldState.RELEASED)
            await _tell(connection, redemption, "SETTLE", reason, now_ms, points=points, actor=actor)
            await ledger.put_holds(
                {key: without(its_holds, redemption_id) for key, its_holds in ledger.holds.items() if key in keys}
            )
            return settled

        return await self._database.transaction(work, planned_once=True)

    async def settle(self, connection: Connection, merchant_id: str, settlements: Sequence[Settlement]) -> None:
        """Settle what SHOPLINE has booked, in the transaction that writes its events, whose accounts are locked."""
        keys: defaultdict[str, list[AccountKey]] = defaultdict(list)
        for settlement in settlements:
            keys[settlement.hold.redemption_id].append(settlement.account)
        named = {"merchant_id": merchant_id, "redemption_ids": sorted(keys)}
        for redemption in map(queries.read, await connection.fetch(queries.LOCK, named)):
            await _update(connection, redemption.settled(keys[redemption.redemption_id]))

    async def overdue_merchants(self, now_ms: int) -> list[str]:
        """Tell merchants with redemptions that SHOPLINE has not booked in time, without locking anything."""
        async with self._database.autocommit() as connection:
            values = {"now_ms": now_ms, "limit": SWEEP_COUNT}
            return [row.merchant_id for row in await connection.fetch(queries.LIST_OVERDUE_MERCHANTS, values)]

    async def release_overdue(self, merchant_id: str, now_ms: int) -> int:
        """Release what a merchant's redemptions hold that SHOPLINE has not booked in time; tells how many there were.

        Accounts that somebody works on are left for the next time, so that several servers do not wait for each other.
        """

        async def work(connection: Connection) -> int:
            values = {"merchant_id": merchant_id, "now_ms": now_ms, "limit": SWEEP_COUNT}
            overdue = [queries.read(row) for row in await connection.fetch(queries.FIND_OVERDUE, values)]
            ledger = self._open_ledger(connection, merchant_id)
            await ledger.lock({hold.key for redemption in overdue for hold in redemption.holds}, skip_locked=True)
            free = [
                redemption.redemption_id
                for redemption in overdue
                if all(hold.key in ledger.accounts for hold in redemption.holds)
            ]
            named = {"merchant_id": merchant_id, "redemption_ids": sorted(free)}
            count = 0
            for redemption in map(queries.read, await connection.fetch(queries.LOCK_FREE, named)):
                if redemption.held(HoldState.OPEN):
                    await _update(connection, redemption.released())
                    points = redemption.held(HoldState.OPEN)
                    await _tell(connection, redemption, "RELEASE", "not booked in time", now_ms, points=points)
                    count += 1
            await ledger.put_holds({key: released(holds, now_ms) for key, holds in ledger.holds.items()})
            return count

        return await self._database.transaction(work, planned_once=True)

    async def _locked(
        self, connection: Connection, merchant_id: str, redemption_id: str
    ) -> tuple[Redemption, AccountRepository]:
        """Lock a redemption behind the accounts that it holds. Which these are never changes."""
        named = {"merchant_id": merchant_id, "redemption_id": redemption_id}
        row = await connection.fetch_one(queries.READ_BY_ID, named)
        if row is None:
            raise redemption_not_found(redemption_id)
        ledger = self._open_ledger(connection, merchant_id)
        await ledger.lock({hold.key for hold in queries.read(row).holds})
        (row,) = await connection.fetch(queries.LOCK, {"merchant_id": merchant_id, "redemption_ids": [redemption_id]})
        return queries.read(row), ledger


async def _by_references(connection: Connection, merchant_id: str, references: Iterable[str]) -> list[Redemption]:
    values = {"merchant_id": merchant_id, "references": sorted(set(references))}
    return [queries.read(row) for row in await connection.fetch(queries.READ_BY_REFERENCES, values)]


class _Claim(NamedTuple):
    """A booking that settles a redemption from the beginning, and the program by whose settings it was found."""

    booking: Booking
    redemption: Redemption
    program: Program


class _Redeeming:
    """Orders that are redeemed one after the other, on locked accounts: each finds what those before it have left."""

    def __init__(
        self,
        connection: Connection,
        ledger: AccountRepository,
        codes: Codes,
        accounts: Mapping[AccountKey, Account],
        stored: Iterable[Redemption],
    ) -> None:
        self._connection = connection
        self._ledger = ledger
        self._codes = codes
        self._accounts = dict(accounts)
        self._stored = {redemption.reference: redemption for redemption in stored}
        self._new: list[Redemption] = []
        self._spent: Counter[tuple[str, int]] = Counter()
        self._claimed: dict[str, _Claim] = {}

    async def answer(self, wanted: PendingRedemption, facts: RedemptionContext) -> Redemption | PointbookError:
        """Redeem an order, unless something speaks against it."""
        try:
            return await self._redeem(wanted, facts)
        except RetryTransactionError:
            raise
        except PointbookError as error:
            return error

    async def write(self, merchant_id: str, now_ms: int) -> None:
        """Write what was redeemed, and the holds. A reference that was taken meanwhile runs the transaction again."""
        if not self._new:
            return
        columns = queries.to_columns(self._new)
        if await self._connection.execute(queries.INSERT, {"merchant_id": merchant_id, **columns}) < len(self._new):
            raise RetryTransactionError
        for claim in self._claimed.values():
            booking = claim.booking
            await self._ledger.settle(booking.event_id, claim.redemption.redemption_id, booking.settled_redemption_id)
        keys = {hold.key for redemption in self._new for hold in redemption.holds if hold.state is HoldState.OPEN}
        keys |= await self._release_again(merchant_id, now_ms)
        if keys:
            await self._ledger.put_holds({key: self._accounts[key].holds for key in keys})

    async def _release_again(self, merchant_id: str, now_ms: int) -> set[AccountKey]:
        """Release the earlier redemptions whose bookings are claimed, and return the accounts where that is.

        Their holds wait for other decreases, as they did before, with the settings of the program that claims: what
        their own had been is not kept.
        """
        lost: defaultdict[str, dict[AccountKey, Program]] = defaultdict(dict)
        for claim in self._claimed.values():
            if claim.booking.settled_redemption_id:
                lost[claim.booking.settled_redemption_id][claim.booking.account] = claim.program
        if not lost:
            return set()
        named = {"merchant_id": merchant_id, "redemption_ids": sorted(lost)}
        for earlier in map(queries.read, await self._connection.fetch(queries.LOCK, named)):
            programs = lost[earlier.redemption_id]
            await _update(self._connection, earlier.unsettled(programs))
            for held in earlier.holds:
                if held.key in programs:
                    hold = _hold_of(earlier, held, programs[held.key])
                    account = self._accounts[held.key]
                    holds = sorted((*account.holds, hold._replace(is_released=True)), key=_opened_at_ms)
                    self._accounts[held.key] = replace(account, holds=released(holds, now_ms))
        return {key for programs in lost.values() for key in programs}

    async def _redeem(self, wanted: PendingRedemption, facts: RedemptionContext) -> Redemption:
        order = wanted.order
        assessment = assess(order.ask, self._as_it_stands(facts))
        if order.reference in self._stored:
            return order.checked(self._stored[order.reference], assessment)
        if order.content(assessment) != order.content(wanted.before) or not facts.one_group:
            # The locks, and the code, are for what was asked for before.
            raise to_error([CHANGED_MEANWHILE])
        if violations := sort_violations([*assessment.violations, *wanted.proof.findings(assessment)]):
            raise to_error(violations)
        booking = assessment.booking
        draws = await self._draws(assessment) if booking is None else booking.draws
        await self._consume(wanted, facts.now_ms)
        redemption = order.redemption(assessment, new_redemption_id(), draws, actor=wanted.proof.actor)
        self._note(redemption)
        program = assessment.facts.program
        if program is None:
            raise LookupError("points are redeemed in a program")
        if booking is not None:
            self._claimed[booking.event_id] = _Claim(booking, redemption, program)
            return redemption
        for held in redemption.holds:
            account = self._accounts[held.key]
            holds = (*account.holds, _hold_of(redemption, held, program))
            self._accounts[held.key] = replace(account, holds=holds)
        return redemption

    async def _consume(self, wanted: PendingRedemption, now_ms: int) -> None:
        """Use the code up. It may have been used, or have ended, since it was compared."""
        challenge, proof = wanted.challenge, wanted.proof
        if challenge is None:
            return
        if not await self._codes.consume(self._connection, challenge, proof.actor, now_ms):
            raise to_error([proof.wrong])

    def _as_it_stands(self, facts: RedemptionContext) -> RedemptionContext:
        """Return the facts with what was redeemed a moment ago, and without the bookings claimed by that."""
        program_id = 0 if facts.program is None else facts.program.program_id
        spent = sum(self._spent[name, program_id] for name in facts.redeemers)
        bookings = tuple(booking for booking in facts.bookings if booking.event_id not in self._claimed)
        return replace(facts, accounts=self._accounts, usage=facts.usage.after(spent), bookings=bookings)

    async def _draws(self, assessment: Assessment) -> list[Allocation]:
        points, now_ms = assessment.points, assessment.facts.now_ms
        keys = [source.key for source in assessment.facts.sources if source.key in self._accounts]
        for key in keys:
            self._accounts[key] = await self._ledger.complete(key, self._accounts[key], now_ms, points=points)
        event_ids = event_ids_of(self._accounts[key] for key in keys) if len(keys) > 1 else []
        made_at_ms = await self._ledger.made_at_ms(event_ids) if event_ids else {}
        return allocate(points, assessment.facts.sources, self._accounts, made_at_ms, now_ms)

    def _note(self, redemption: Redemption) -> None:
        """Make a redemption visible to the orders that follow."""
        self._stored[redemption.reference] = redemption
        self._new.append(redemption)
        self._spent[redemption.content.redeemer, redemption.content.program_id] += redemption.content.points


def _hold_of(redemption: Redemption, held: AccountHold, program: Program) -> Hold:
    """Return the open hold of what a redemption holds of an account, with the settings of a program."""
    return Hold(
        redemption.redemption_id,
        held.points,
        redemption.created_at_ms,
        redemption.settle_by_ms,
        program.settlement_scenes,
        lead_ms=lead_ms_of(program),
    )


def _opened_at_ms(hold: Hold) -> int:
    return hold.opened_at_ms


def _reduced(ledger: AccountRepository, redemption: Redemption) -> dict[AccountKey, tuple[Hold, ...]]:
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
    await connection.execute(queries.UPDATE, named | queries.write_changing(redemption))


async def _tell(
    connection: Connection,
    redemption: Redemption,
    action: str,
    reason: str,
    now_ms: int,
    *,
    points: int,
    actor: str = "",
) -> None:
    values = {
        "audit_id": time_ordered_id(),
        "merchant_id": redemption.merchant_id,
        "redemption_id": redemption.redemption_id,
        "action": action,
        "reason": reason,
        "now_ms": now_ms,
        "redeemer": redemption.content.redeemer,
        "points": points,
        "actor": actor,
    }
    await connection.execute(queries.INSERT_AUDIT, values)
