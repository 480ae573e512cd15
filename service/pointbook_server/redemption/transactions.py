"""The transactions of redemption.

Each one locks in the same order: customers, accounts, redemptions, challenges.
Source: docs/reference/redemption.md#lock-order
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from pointbook_server.clock import Clock, time_ordered_id
from pointbook_server.db.database import Connection, Database
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.holds import Hold, release_overdue, without_redemption
from pointbook_server.ledger.model import Account, AccountKey, Expiry
from pointbook_server.ledger.posting import Settlement
from pointbook_server.programs.model import Program
from pointbook_server.redemption import queries
from pointbook_server.redemption.allocation import Allocation, allocate, lot_event_ids
from pointbook_server.redemption.assessment import Assessment, RedemptionContext, RedemptionRequest, assess
from pointbook_server.redemption.bookings import Booking, settlement_lead_ms
from pointbook_server.redemption.commands import PendingRedemption, RedemptionFilter, Reversal
from pointbook_server.redemption.context_loader import (
    AccountRepository,
    AccountsNotLockedError,
    ContextLoader,
    OpenCustomers,
    OpenLedger,
    Programs,
)
from pointbook_server.redemption.details import DetailsLoader
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
from pointbook_server.redemption.violations import Violation, sort_violations, to_error
from pointbook_server.validation_codes.model import Challenge

CHANGED_MEANWHILE = Violation.of(
    Reason.REDEMPTION_FAILED, "The customer, the group or the program has changed meanwhile; retry."
)
RELEASE_COUNT = 100
"""The most redemptions that one transaction releases."""


class CodeTransactions(Protocol):
    """The part of one-time codes that locks and consumes them."""

    async def lock(self, connection: Connection, merchant_id: str, customers: Iterable[str]) -> None:
        """Lock customers' live challenges, in sorted order."""

    async def consume(self, connection: Connection, challenge: Challenge, actor: str, now_ms: int) -> bool:
        """Consume a code or a missed call; return False if it is no longer live."""


class RedemptionTransactions:
    """The stored redemptions, and what they hold of accounts."""

    def __init__(
        self,
        database: Database,
        programs: Programs,
        open_ledger: OpenLedger,
        open_customers: OpenCustomers,
        codes: CodeTransactions,
    ) -> None:
        self._database = database
        self._codes = codes
        self._open_ledger = open_ledger
        self._open_customers = open_customers
        self._context_loader = ContextLoader(programs, open_customers)
        self._details_loader = DetailsLoader(programs, open_customers, open_ledger)

    async def assess(self, requests: Sequence[RedemptionRequest], now_ms: int) -> list[Assessment]:
        """Assess requests of one merchant without locks."""
        async with self._database.autocommit() as connection:
            ledger = self._open_ledger(connection, requests[0].merchant_id)
            contexts = await self._context_loader.load(connection, ledger, requests, now_ms)
        return [assess(request, context) for request, context in zip(requests, contexts, strict=True)]

    async def next_expiry(self, merchant_id: str, context: RedemptionContext) -> Expiry | None:
        """Return the soonest expiry in the accounts that may be drawn on."""
        keys = {source.key for source in context.sources} & context.accounts.keys()
        expiries = []
        async with self._database.autocommit() as connection:
            ledger = self._open_ledger(connection, merchant_id)
            for key in sorted(keys):
                expiry = await ledger.next_expiry(key, context.accounts[key], context.now_ms)
                if expiry is not None:
                    expiries.append(expiry)
        if not expiries:
            return None
        soonest_ms = min(expiry.at_ms for expiry in expiries)
        return Expiry(soonest_ms, sum(expiry.points for expiry in expiries if expiry.at_ms == soonest_ms))

    async def redeem(
        self, merchant_id: str, batch: Sequence[PendingRedemption], clock: Clock
    ) -> list[Redemption | PointbookError]:
        """Run commands of one merchant in one transaction.

        Each is assessed again under the locks.
        Returns for each command the redemption that is stored under its reference, or an error: REFERENCE_REUSED, the
        refusal of its violations, or REDEMPTION_FAILED if its content has changed since its first assessment.
        """
        requests = [pending.command.request for pending in batch]
        customers = [pending.assessment.context.customer for pending in batch]
        customer_ids = {customer.customer_id for customer in customers if customer is not None}
        challenged = {pending.challenge.purpose.customer for pending in batch if pending.challenge is not None}
        account_keys = {key for pending in batch for key in pending.assessment.context.account_keys}

        async def work(connection: Connection) -> list[Redemption | PointbookError]:
            if customer_ids:
                await self._open_customers(connection, merchant_id).lock(customer_ids)
            ledger = self._open_ledger(connection, merchant_id)
            await ledger.lock(account_keys)
            try:
                contexts = await self._context_loader.load(connection, ledger, requests, clock(), locked=account_keys)
            except AccountsNotLockedError as error:
                account_keys.update(error.keys)
                raise RetryTransactionError from None
            stored = await _find_by_references(
                connection, merchant_id, (pending.command.reference for pending in batch)
            )
            if challenged:
                await self._codes.lock(connection, merchant_id, challenged)
            redeem_batch = _RedeemBatch(connection, ledger, self._codes, contexts[0].accounts, stored)
            results = [
                await redeem_batch.redeem(pending, context) for pending, context in zip(batch, contexts, strict=True)
            ]
            await redeem_batch.write(merchant_id, contexts[0].now_ms)
            return results

        return await self._database.transaction(work, planned_once=True)

    async def find_by_reference(self, merchant_id: str, reference: str) -> Redemption | None:
        """Return the redemption of a reference; None if there is none."""
        async with self._database.autocommit() as connection:
            return next(iter(await _find_by_references(connection, merchant_id, [reference])), None)

    async def get_redemption(
        self, merchant_id: str, redemption_id: str, reference: str, now_ms: int
    ) -> RedemptionDetails:
        """Return a redemption by its id, or by its reference if the id is empty.

        Raises REDEMPTION_NOT_FOUND.
        """
        async with self._database.autocommit() as connection:
            if redemption_id:
                params = {"merchant_id": merchant_id, "redemption_id": redemption_id}
                rows = await connection.fetch(queries.READ_BY_ID, params)
                redemptions = list(map(queries.read_redemption, rows))
            else:
                redemptions = await _find_by_references(connection, merchant_id, [reference])
            if not redemptions:
                raise redemption_not_found(redemption_id)
            (details,) = await self._details_loader.load(connection, merchant_id, redemptions, now_ms)
        return details

    async def list_redemptions(
        self, merchant_id: str, filters: RedemptionFilter, now_ms: int, *, before: tuple[int, str], limit: int
    ) -> list[RedemptionDetails]:
        """Return a page of a merchant's redemptions, the newest first.

        `before` is a position (time in ms, id): only older redemptions are returned.
        """
        before_ms, before_id = before
        params = {
            "merchant_id": merchant_id,
            "redeemers": list(filters.redeemers or ()),
            "state": "" if filters.state is None else filters.state.value,
            "start_ms": filters.start_ms,
            "end_ms": filters.end_ms,
            "before_ms": before_ms,
            "before_id": before_id,
            "now_ms": now_ms,
            "limit": limit,
        }
        statement = queries.LIST_BY_MERCHANT if filters.redeemers is None else queries.LIST_BY_REDEEMERS
        async with self._database.autocommit() as connection:
            redemptions = list(map(queries.read_redemption, await connection.fetch(statement, params)))
            return await self._details_loader.load(connection, merchant_id, redemptions, now_ms)

    async def reverse(self, reversal: Reversal) -> Redemption:
        """Reverse points once per reference, and return the redemption after that.

        Raises REDEMPTION_NOT_FOUND, REFERENCE_REUSED, ALREADY_REVERSED and REDEMPTION_SETTLED.
        """
        merchant_id = reversal.merchant_id

        async def work(connection: Connection) -> Redemption:
            redemption, ledger = await self._lock_redemption(connection, merchant_id, reversal.redemption_id)
            key = {"merchant_id": merchant_id, "reference": reversal.reference}
            if row := await connection.fetch_one(queries.READ_REVERSAL, key):
                if (row.redemption_id, row.points) != (reversal.redemption_id, reversal.points):
                    raise reference_reused(reversal.reference)
                return redemption
            reversed_redemption = redemption.reverse(reversal.points)
            params = key | {
                "redemption_id": reversal.redemption_id,
                "points": reversal.points,
                "notes": reversal.notes,
                "now_ms": reversal.at_ms,
                "redeemer": redemption.content.redeemer,
                "reversed_points": reversed_redemption.reversed_points - redemption.reversed_points,
                "actor": reversal.actor,
            }
            if not await connection.execute(queries.INSERT_REVERSAL, params):
                raise RetryTransactionError  # A concurrent call has inserted the reference.
            await _update(connection, reversed_redemption)
            await ledger.write_holds(_holds_after_reversal(ledger, reversed_redemption))
            return reversed_redemption

        return await self._database.transaction(work, planned_once=True)

    async def settle_by_hand(
        self, merchant_id: str, redemption_id: str, reason: str, actor: str, now_ms: int
    ) -> Redemption:
        """Settle the open and released holds of a redemption, as a webhook would.

        Raises REDEMPTION_NOT_FOUND, and ALREADY_REVERSED if nothing is left to settle.
        """

        async def work(connection: Connection) -> Redemption:
            redemption, ledger = await self._lock_redemption(connection, merchant_id, redemption_id)
            if redemption.reversed_points == redemption.content.points:
                raise already_reversed(redemption)
            keys = [hold.key for hold in redemption.holds]
            settled = redemption.with_settled(keys)
            if settled == redemption:
                return redemption
            await _update(connection, settled)
            points = redemption.held_points(HoldState.OPEN, HoldState.RELEASED)
            await _insert_audit(connection, redemption, "SETTLE", reason, now_ms, points=points, actor=actor)
            await ledger.write_holds(
                {key: without_redemption(holds, redemption_id) for key, holds in ledger.holds.items() if key in keys}
            )
            return settled

        return await self._database.transaction(work, planned_once=True)

    async def settle(self, connection: Connection, merchant_id: str, settlements: Sequence[Settlement]) -> None:
        """Settle holds in the transaction that writes SHOPLINE's events.

        It has locked the accounts.
        """
        keys: defaultdict[str, list[AccountKey]] = defaultdict(list)
        for settlement in settlements:
            keys[settlement.hold.redemption_id].append(settlement.account_key)
        params = {"merchant_id": merchant_id, "redemption_ids": sorted(keys)}
        for redemption in map(queries.read_redemption, await connection.fetch(queries.LOCK, params)):
            await _update(connection, redemption.with_settled(keys[redemption.redemption_id]))

    async def overdue_merchants(self, now_ms: int) -> list[str]:
        """Return merchants with overdue redemptions, without locks."""
        async with self._database.autocommit() as connection:
            params = {"now_ms": now_ms, "limit": RELEASE_COUNT}
            return [row.merchant_id for row in await connection.fetch(queries.LIST_OVERDUE_MERCHANTS, params)]

    async def release_overdue(self, merchant_id: str, now_ms: int) -> int:
        """Release a merchant's overdue redemptions, and return how many.

        Redemptions with locked accounts are skipped, so that servers do not wait for each other.
        """

        async def work(connection: Connection) -> int:
            params = {"merchant_id": merchant_id, "now_ms": now_ms, "limit": RELEASE_COUNT}
            overdue = [queries.read_redemption(row) for row in await connection.fetch(queries.FIND_OVERDUE, params)]
            ledger = self._open_ledger(connection, merchant_id)
            await ledger.lock({hold.key for redemption in overdue for hold in redemption.holds}, skip_locked=True)
            lockable = [
                redemption.redemption_id
                for redemption in overdue
                if all(hold.key in ledger.accounts for hold in redemption.holds)
            ]
            ids = {"merchant_id": merchant_id, "redemption_ids": sorted(lockable)}
            count = 0
            for redemption in map(queries.read_redemption, await connection.fetch(queries.LOCK_UNLOCKED, ids)):
                if points := redemption.held_points(HoldState.OPEN):
                    await _update(connection, redemption.with_open_released())
                    await _insert_audit(connection, redemption, "RELEASE", "not booked in time", now_ms, points=points)
                    count += 1
            await ledger.write_holds({key: release_overdue(holds, now_ms) for key, holds in ledger.holds.items()})
            return count

        return await self._database.transaction(work, planned_once=True)

    async def _lock_redemption(
        self, connection: Connection, merchant_id: str, redemption_id: str
    ) -> tuple[Redemption, AccountRepository]:
        """Lock a redemption after the accounts that it holds.

        Which accounts these are never changes.
        """
        params = {"merchant_id": merchant_id, "redemption_id": redemption_id}
        row = await connection.fetch_one(queries.READ_BY_ID, params)
        if row is None:
            raise redemption_not_found(redemption_id)
        ledger = self._open_ledger(connection, merchant_id)
        await ledger.lock({hold.key for hold in queries.read_redemption(row).holds})
        (row,) = await connection.fetch(queries.LOCK, {"merchant_id": merchant_id, "redemption_ids": [redemption_id]})
        return queries.read_redemption(row), ledger


async def _find_by_references(connection: Connection, merchant_id: str, references: Iterable[str]) -> list[Redemption]:
    params = {"merchant_id": merchant_id, "references": sorted(set(references))}
    return [queries.read_redemption(row) for row in await connection.fetch(queries.READ_BY_REFERENCES, params)]


class _ClaimedBooking(NamedTuple):
    """A booking claimed by a redemption, and the program that it was found by."""

    booking: Booking
    redemption: Redemption
    program: Program


class _RedeemBatch:
    """Commands that run one after the other on locked accounts.

    Each sees the effects of those before it.
    """

    def __init__(
        self,
        connection: Connection,
        ledger: AccountRepository,
        codes: CodeTransactions,
        accounts: Mapping[AccountKey, Account],
        stored: Iterable[Redemption],
    ) -> None:
        self._connection = connection
        self._ledger = ledger
        self._codes = codes
        self._accounts = dict(accounts)
        self._stored = {redemption.reference: redemption for redemption in stored}
        self._new: list[Redemption] = []
        self._new_points: Counter[tuple[str, int]] = Counter()
        """The points of the new redemptions by redeemer and program."""
        self._claimed: dict[str, _ClaimedBooking] = {}

    async def redeem(self, pending: PendingRedemption, context: RedemptionContext) -> Redemption | PointbookError:
        """Run a command, and return its redemption or its error."""
        try:
            return await self._redeem(pending, context)
        except RetryTransactionError:
            raise
        except PointbookError as error:
            return error

    async def write(self, merchant_id: str, now_ms: int) -> None:
        """Write the new redemptions and the holds.

        The transaction is retried if a reference was inserted meanwhile.
        """
        if not self._new:
            return
        columns = queries.to_columns(self._new)
        if await self._connection.execute(queries.INSERT, {"merchant_id": merchant_id, **columns}) < len(self._new):
            raise RetryTransactionError
        for claimed in self._claimed.values():
            booking = claimed.booking
            await self._ledger.record_settlement(
                booking.event_id, claimed.redemption.redemption_id, booking.settled_redemption_id
            )
        keys = {hold.key for redemption in self._new for hold in redemption.holds if hold.state is HoldState.OPEN}
        keys |= await self._release_again(merchant_id, now_ms)
        if keys:
            await self._ledger.write_holds({key: self._accounts[key].holds for key in keys})

    async def _release_again(self, merchant_id: str, now_ms: int) -> set[AccountKey]:
        """Release the redemptions that lose their bookings to new ones.

        Returns the accounts concerned.
        Their holds wait for other decreases again, with the settings of the claiming program: those of their own
        program at the time are not stored.
        """
        losing: defaultdict[str, dict[AccountKey, Program]] = defaultdict(dict)
        for claimed in self._claimed.values():
            if claimed.booking.settled_redemption_id:
                losing[claimed.booking.settled_redemption_id][claimed.booking.account] = claimed.program
        if not losing:
            return set()
        params = {"merchant_id": merchant_id, "redemption_ids": sorted(losing)}
        for earlier in map(queries.read_redemption, await self._connection.fetch(queries.LOCK, params)):
            programs = losing[earlier.redemption_id]
            await _update(self._connection, earlier.with_released(programs))
            for account_hold in earlier.holds:
                if account_hold.key in programs:
                    hold = _to_hold(earlier, account_hold, programs[account_hold.key])
                    account = self._accounts[account_hold.key]
                    holds = sorted((*account.holds, hold._replace(is_released=True)), key=_opened_at_ms)
                    self._accounts[account_hold.key] = replace(account, holds=release_overdue(holds, now_ms))
        return {key for programs in losing.values() for key in programs}

    async def _redeem(self, pending: PendingRedemption, context: RedemptionContext) -> Redemption:
        command = pending.command
        assessment = assess(command.request, self._current_context(context))
        if command.reference in self._stored:
            return command.check_stored(self._stored[command.reference], assessment)
        if command.content(assessment) != command.content(pending.assessment) or not context.selects_one_group:
            # The locks, and the code, are for the content of the first assessment.
            raise to_error([CHANGED_MEANWHILE])
        if violations := sort_violations([*assessment.violations, *pending.evidence.violations(assessment)]):
            raise to_error(violations)
        program, booking = assessment.context.program, assessment.booking
        if program is None:
            raise LookupError("an assessment without violations has a program")
        draws = await self._allocate(assessment) if booking is None else booking.draws
        await self._consume(pending, context.now_ms)
        redemption = command.redemption(assessment, program, new_redemption_id(), draws, actor=pending.evidence.actor)
        self._add(redemption)
        if booking is not None:
            self._claimed[booking.event_id] = _ClaimedBooking(booking, redemption, program)
            return redemption
        for account_hold in redemption.holds:
            account = self._accounts[account_hold.key]
            holds = (*account.holds, _to_hold(redemption, account_hold, program))
            self._accounts[account_hold.key] = replace(account, holds=holds)
        return redemption

    async def _consume(self, pending: PendingRedemption, now_ms: int) -> None:
        """Consume the code or the missed call.

        It may have been consumed or have ended since it was checked.
        """
        challenge, evidence = pending.challenge, pending.evidence
        if challenge is None:
            return
        if not await self._codes.consume(self._connection, challenge, evidence.actor, now_ms):
            raise to_error([evidence.rejection])

    def _current_context(self, context: RedemptionContext) -> RedemptionContext:
        """Return a context with the effects of the commands so far."""
        program_id = 0 if context.program is None else context.program.program_id
        new_points = sum(self._new_points[name, program_id] for name in context.redeemers)
        bookings = tuple(booking for booking in context.bookings if booking.event_id not in self._claimed)
        return replace(context, accounts=self._accounts, usage=context.usage.plus(new_points), bookings=bookings)

    async def _allocate(self, assessment: Assessment) -> list[Allocation]:
        points, now_ms = assessment.points, assessment.context.now_ms
        keys = [source.key for source in assessment.context.sources if source.key in self._accounts]
        for key in keys:
            self._accounts[key] = await self._ledger.load_lots(key, self._accounts[key], now_ms, points=points)
        event_ids = lot_event_ids(self._accounts[key] for key in keys) if len(keys) > 1 else []
        created_at_ms = await self._ledger.find_event_times(event_ids) if event_ids else {}
        return allocate(points, assessment.context.sources, self._accounts, created_at_ms, now_ms)

    def _add(self, redemption: Redemption) -> None:
        """Add a new redemption, which the commands after it see."""
        self._stored[redemption.reference] = redemption
        self._new.append(redemption)
        self._new_points[redemption.content.redeemer, redemption.content.program_id] += redemption.content.points


def _to_hold(redemption: Redemption, account_hold: AccountHold, program: Program) -> Hold:
    """Build an account's open hold for a redemption, with the settings of a program."""
    return Hold(
        redemption.redemption_id,
        account_hold.points,
        redemption.created_at_ms,
        redemption.settle_by_ms,
        program.settlement_scenes,
        lead_ms=settlement_lead_ms(program),
    )


def _opened_at_ms(hold: Hold) -> int:
    return hold.opened_at_ms


def _holds_after_reversal(ledger: AccountRepository, redemption: Redemption) -> dict[AccountKey, tuple[Hold, ...]]:
    """Return the holds of a redemption's accounts after its reversal."""
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
    params = {"merchant_id": redemption.merchant_id, "redemption_id": redemption.redemption_id}
    await connection.execute(queries.UPDATE, params | queries.to_mutable_columns(redemption))


async def _insert_audit(
    connection: Connection,
    redemption: Redemption,
    action: str,
    reason: str,
    now_ms: int,
    *,
    points: int,
    actor: str = "",
) -> None:
    params = {
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
    await connection.execute(queries.INSERT_AUDIT, params)
