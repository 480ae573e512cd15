"""A batch of redeem commands, run one after the other in one transaction."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from pointbook_server.db.database import Connection
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import PointbookError
from pointbook_server.ledger.holds import Hold, release_overdue
from pointbook_server.ledger.model import Account, AccountKey
from pointbook_server.programs.model import Program
from pointbook_server.reasons import Reason
from pointbook_server.redemption import queries
from pointbook_server.redemption.allocation import Allocation, allocate, lot_event_ids
from pointbook_server.redemption.assessment import Assessment, RedemptionContext, assess
from pointbook_server.redemption.bookings import Booking, settlement_lead_ms
from pointbook_server.redemption.caps import has_caps
from pointbook_server.redemption.commands import PendingRedemption
from pointbook_server.redemption.context_loader import AccountRepository
from pointbook_server.redemption.model import AccountHold, HoldState, Redemption, new_redemption_id
from pointbook_server.redemption.violations import Violation, sort_violations, to_error
from pointbook_server.validation_codes.model import Challenge
from pointbook_server.validation_codes.rules import can_be_used

CHANGED_MEANWHILE = Violation.of(
    Reason.REDEMPTION_FAILED, "The customer, the group or the program has changed in the meantime; retry."
)


class CodeTransactions(Protocol):
    """The part of one-time codes that locks and uses them."""

    async def lock(self, connection: Connection, merchant_id: str, customers: Iterable[str]) -> list[Challenge]:
        """Lock customers' live challenges, in sorted order, and return them."""

    async def use(
        self, connection: Connection, merchant_id: str, used: Sequence[tuple[Challenge, str]], now_ms: int
    ) -> None:
        """Use locked challenges, each with the actor."""


class _ClaimedBooking(NamedTuple):
    """A booking, the redemption that claims it, and the redemption's program."""

    booking: Booking
    redemption: Redemption
    program: Program


class RedeemBatch:
    """A batch of commands on locked accounts; each sees the effects of earlier ones.

    `accounts` are those that the contexts of all commands share: the batch changes them.
    """

    def __init__(
        self,
        connection: Connection,
        ledger: AccountRepository,
        codes: CodeTransactions,
        accounts: dict[AccountKey, Account],
        *,
        stored: Iterable[Redemption],
        live: Iterable[Challenge],
    ) -> None:
        self._connection = connection
        self._ledger = ledger
        self._codes = codes
        self._accounts = accounts
        self._stored = {redemption.reference: redemption for redemption in stored}
        self._live = {challenge.challenge_id: challenge for challenge in live}
        self._used: list[tuple[Challenge, str]] = []
        """The challenges that new redemptions use, with their actors."""
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
        """Write the new redemptions, the use of their codes, and their holds.

        Raises RetryTransactionError if a concurrent call has inserted a reference.
        """
        if not self._new:
            return
        params = {"merchant_id": merchant_id, "redemption_row": list(map(queries.to_row, self._new))}
        if await self._connection.count_written(queries.INSERT, params) < len(self._new):
            raise RetryTransactionError
        if self._used:
            await self._codes.use(self._connection, merchant_id, self._used, now_ms)
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
        """Release the redemptions that lose their bookings; return the bookings' accounts.

        The holds wait for other decreases again, with the settings of the claiming program: their original settings are
        not stored.
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
            await update_redemption(self._connection, earlier.with_released(programs))
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
        content = command.content(assessment)
        if content != command.content(pending.assessment) or not context.selects_one_group:
            # The locks and the code belong to the content of the first assessment.
            raise to_error([CHANGED_MEANWHILE])
        if violations := sort_violations([*assessment.violations, *pending.evidence.violations(assessment)]):
            raise to_error(violations)
        program, booking = assessment.context.program, assessment.booking
        if program is None:
            raise LookupError("an assessment without violations has a program")
        draws = await self._allocate(assessment) if booking is None else booking.draws
        self._use_challenge(pending, context.now_ms)
        redemption = command.redemption(
            assessment, content, program, new_redemption_id(), draws, actor=pending.evidence.actor
        )
        self._add(redemption)
        if booking is not None:
            self._claimed[booking.event_id] = _ClaimedBooking(booking, redemption, program)
            return redemption
        for account_hold in redemption.holds:
            account = self._accounts[account_hold.key]
            holds = (*account.holds, _to_hold(redemption, account_hold, program))
            self._accounts[account_hold.key] = replace(account, holds=holds)
        return redemption

    def _use_challenge(self, pending: PendingRedemption, now_ms: int) -> None:
        """Use the code or the missed call. Raises its refusal if it is no longer live."""
        challenge, evidence = pending.challenge, pending.evidence
        if challenge is None:
            return
        live = self._live.get(challenge.challenge_id)
        if live is None or not can_be_used(live, challenge, now_ms):
            raise to_error([evidence.rejection])
        del self._live[challenge.challenge_id]
        self._used.append((live, evidence.actor))

    def _current_context(self, context: RedemptionContext) -> RedemptionContext:
        """Return a context with the effects of the commands so far."""
        if context.program is not None and has_caps(context.program):
            program_id = context.program.program_id
            new_points = sum(self._new_points[name, program_id] for name in context.redeemers)
            context = context._replace(usage=context.usage.plus(new_points))
        if context.bookings:
            bookings = tuple(booking for booking in context.bookings if booking.event_id not in self._claimed)
            context = context._replace(bookings=bookings)
        return context

    async def _allocate(self, assessment: Assessment) -> list[Allocation]:
        points, now_ms = assessment.points, assessment.context.now_ms
        keys = [source.key for source in assessment.context.sources if source.key in self._accounts]
        for key in keys:
            if self._accounts[key].overflow is not None:
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


async def update_redemption(connection: Connection, redemption: Redemption) -> None:
    """Write the draws and the holds of a locked redemption."""
    params = {"merchant_id": redemption.merchant_id, "redemption_id": redemption.redemption_id}
    await connection.execute(queries.UPDATE, params | queries.to_mutable_columns(redemption))
