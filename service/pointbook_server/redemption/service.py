"""Validating and redeeming: what happens between the rules, the codes and the transactions, and in which order."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pointbook_server.batching import Line
from pointbook_server.clock import Clock
from pointbook_server.database import Connection
from pointbook_server.errors import FieldViolation, PointbookError, Reason, not_implemented
from pointbook_server.programs.model import Channel, Program
from pointbook_server.redemption.asking import Ask, Assessment
from pointbook_server.redemption.model import Finding, finding, in_order, refusal
from pointbook_server.redemption.redeemed import Order, Redemption, Reversal, new_redemption_id, redemption_not_found
from pointbook_server.redemption.store import Filter, RedemptionsStore, Wanted
from pointbook_server.validation_codes.model import Challenge, Issued, Purpose

CODE_INVALID = finding(Reason.CODE_INVALID, "The code is not valid for this redemption.")
ASKS_IN_BATCH_MAX = 100
ASKS_WAITING_MAX = 10_000
LANES = 4
"""How many merchants' asks are looked into at a time; one merchant's share their statements."""


class Codes(Protocol):
    """Issues, checks and uses one-time codes."""

    async def issue(self, purpose: Purpose, program: Program, channel: Channel | None) -> Issued:
        """Send the customer a code, unless the one that was sent lately still holds."""

    async def check(self, purpose: Purpose, channel: Channel | None, challenge_id: str, code: str) -> bool:
        """Tell whether a code is the one for a purpose, without consuming it."""

    async def guess(self, purpose: Purpose, channel: Channel | None, challenge_id: str, code: str) -> Challenge | None:
        """Compare a code, and return its challenge where it is right, whose attempt is then used or given back."""

    async def give_back(self, challenge: Challenge, challenge_id: str) -> None:
        """Give the attempt of a right guess back."""

    async def consume(self, connection: Connection, challenge: Challenge, challenge_id: str) -> bool:
        """Use a code up in somebody's transaction; False where another call has."""


@dataclass(frozen=True, slots=True)
class Proof:
    """How a caller wants the customer to be validated: by a code, or by going without, never both.

    `may_skip` is whether the caller may go without at all.
    """

    code: str = ""
    challenge_id: str = ""
    skips: bool = False
    may_skip: bool = False
    is_coming: bool = False
    """Whether a code is to be issued by the same call."""

    def findings(self, assessment: Assessment) -> Iterator[Finding]:
        """Find what speaks against the way of validation, but for the code itself."""
        program = assessment.facts.program
        if program is None:
            return
        if self.skips:
            if not program.validation.allow_skip or not self.may_skip:
                yield finding(Reason.SKIP_NOT_ALLOWED, "The validation must not be skipped here.")
        elif not self.code and not self.is_coming and assessment.needs_validation:
            yield finding(Reason.VALIDATION_REQUIRED, "The program wants the customer to be validated.")


@dataclass(frozen=True, slots=True)
class WantedReversal:
    """What a caller wants to give back, of a redemption by its id, or by the reference it was redeemed under."""

    merchant_id: str
    redemption_id: str
    redeemed_reference: str
    reference: str
    points: int
    notes: str


class Redemptions:
    """Answers asks and redeems."""

    def __init__(self, store: RedemptionsStore, codes: Codes, clock: Clock) -> None:
        self._store = store
        self._codes = codes
        self._clock = clock
        self._line: Line[str, Ask, Assessment] = Line(
            self._assess, batch_max=ASKS_IN_BATCH_MAX, waiting_max=ASKS_WAITING_MAX, lanes=LANES
        )
        self._orders: Line[str, Wanted, Redemption] = Line(
            self._redeem, batch_max=ASKS_IN_BATCH_MAX, waiting_max=ASKS_WAITING_MAX, lanes=LANES
        )

    async def assess(self, ask: Ask) -> Assessment:
        """Check an ask, together with those that wait at the same time. Raises INVALID_FIELDS for contradictions."""
        self._line.admit(1)
        (answer,) = self._line.put(ask.merchant_id, [ask])
        assessment = await answer
        if isinstance(assessment, PointbookError):
            raise assessment
        if not assessment.facts.one_group:
            violation = FieldViolation("user_group2", "must choose one group: its fields choose different ones")
            raise PointbookError(Reason.INVALID_FIELDS, "Wrong fields: user_group2.", violations=(violation,))
        program = assessment.facts.program
        if ask.channel is Channel.MISSED_CALL and program and Channel.MISSED_CALL in program.validation.channels:
            raise not_implemented("validation by missed call")
        return assessment

    async def validate(self, ask: Ask, proof: Proof) -> tuple[Assessment, list[Finding]]:
        """Check an ask and how the customer is validated, without consuming the code; tell all that is against it."""
        assessment = await self.assess(ask)
        found = [*assessment.violations, *proof.findings(assessment)]
        if proof.code and not await self._is_right(ask, assessment, proof):
            found.append(CODE_INVALID)
        return assessment, in_order(found)

    async def issue(self, ask: Ask, assessment: Assessment) -> Issued:
        """Send the customer a code for what may be redeemed."""
        program = assessment.facts.program
        if program is None:
            raise LookupError("a code is for a program")
        return await self._codes.issue(purpose_of(ask, assessment), program, ask.channel)

    async def redeem(self, order: Order, proof: Proof) -> Redemption:
        """Redeem once for the order's reference: a repetition is answered what is stored, and costs no attempt.

        Raises the refusal of everything that speaks against it, and REFERENCE_REUSED.
        """
        ask = order.ask
        self._orders.admit(1)
        before = await self.assess(ask)
        found = [*before.violations, *proof.findings(before)]
        if proof.code or found:
            # A repetition must not cost an attempt, nor be refused for what it redeemed itself. Others find what is
            # stored under their locks.
            stored = await self._store.by_reference(ask.merchant_id, order.reference)
            if stored is not None:
                return order.checked(stored, before)
        challenge = None
        wrong: list[Finding] = []
        if proof.code:
            challenge = await self._guess(ask, before, proof)
            wrong = [] if challenge else [CODE_INVALID]
        if violations := in_order([*found, *wrong]):
            await self._give_back(challenge, proof)
            # Another call of this reference may have ended meanwhile, and have used the code.
            if wrong and (stored := await self._store.by_reference(ask.merchant_id, order.reference)):
                return order.checked(stored, before)
            raise refusal(violations)
        placing = asyncio.create_task(self._place(order, before, proof, challenge))
        placing.add_done_callback(_hear_out)
        return await asyncio.shield(placing)

    async def _place(self, order: Order, before: Assessment, proof: Proof, challenge: Challenge | None) -> Redemption:
        """Let an order wait for its transaction, to its end even where the caller goes away.

        So the code's attempt is used or given back, whatever becomes of the order.
        """
        redemption_id = new_redemption_id()
        wanted = Wanted(order, redemption_id, before, proof.findings, self._consumption(challenge, proof))
        (waiting,) = self._orders.put(order.ask.merchant_id, [wanted])
        try:
            answer = await waiting
        except Exception:
            await self._give_back(challenge, proof)
            raise
        if isinstance(answer, PointbookError):
            await self._give_back(challenge, proof)
            raise answer
        if answer.redemption_id != redemption_id:
            # Another call of this reference was quicker, and did without this code.
            await self._give_back(challenge, proof)
        return answer

    async def sweep(self) -> int:
        """Release what SHOPLINE has not booked in time, merchant by merchant; tells how many redemptions that were."""
        now_ms, count = self._clock(), 0
        for merchant_id in await self._store.overdue_merchants(now_ms):
            while released := await self._store.release_overdue(merchant_id, now_ms):
                count += released
        return count

    async def redemption(self, merchant_id: str, redemption_id: str) -> Redemption:
        """Read a redemption. Raises REDEMPTION_NOT_FOUND."""
        return await self._store.redemption(merchant_id, redemption_id)

    async def redemptions(
        self, merchant_id: str, wanted: Filter, *, before: tuple[int, str] | None, limit: int
    ) -> list[Redemption]:
        """Read a page of a merchant's redemptions, the newest first."""
        return await self._store.redemptions(merchant_id, wanted, self._clock(), before=before, limit=limit)

    async def reverse(self, wanted: WantedReversal) -> Redemption:
        """Give points back once.

        Raises REDEMPTION_NOT_FOUND, REFERENCE_REUSED, ALREADY_REVERSED and REDEMPTION_SETTLED.
        """
        redemption_id = wanted.redemption_id
        if not redemption_id:
            found = await self._store.by_reference(wanted.merchant_id, wanted.redeemed_reference)
            if found is None:
                raise redemption_not_found("")
            redemption_id = found.redemption_id
        return await self._store.reverse(
            Reversal(
                merchant_id=wanted.merchant_id,
                redemption_id=redemption_id,
                reference=wanted.reference,
                points=wanted.points,
                notes=wanted.notes,
                at_ms=self._clock(),
            )
        )

    async def settle(self, merchant_id: str, redemption_id: str, reason: str) -> Redemption:
        """Settle by hand what SHOPLINE has booked. Raises REDEMPTION_NOT_FOUND and ALREADY_REVERSED."""
        return await self._store.settle_by_hand(merchant_id, redemption_id, reason, self._clock())

    async def drain(self) -> None:
        """Wait until no ask is being looked into, and nothing is being redeemed."""
        await self._line.drain()
        await self._orders.drain()

    async def _assess(self, _merchant_id: str, asks: Sequence[Ask]) -> list[Assessment | PointbookError]:
        return [*await self._store.assess(asks, self._clock())]

    async def _redeem(self, merchant_id: str, wanted: Sequence[Wanted]) -> list[Redemption | PointbookError]:
        return await self._store.redeem(merchant_id, wanted, self._clock)

    async def _is_right(self, ask: Ask, assessment: Assessment, proof: Proof) -> bool:
        purpose = purpose_of(ask, assessment)
        if not purpose.customer or purpose.points <= 0:
            return False
        return await self._codes.check(purpose, ask.channel, proof.challenge_id, proof.code)

    async def _guess(self, ask: Ask, assessment: Assessment, proof: Proof) -> Challenge | None:
        purpose = purpose_of(ask, assessment)
        if not purpose.customer or purpose.points <= 0:
            return None
        return await self._codes.guess(purpose, ask.channel, proof.challenge_id, proof.code)

    async def _give_back(self, challenge: Challenge | None, proof: Proof) -> None:
        if challenge is not None:
            await self._codes.give_back(challenge, proof.challenge_id)

    def _consumption(self, challenge: Challenge | None, proof: Proof) -> Callable[[Connection], Awaitable[None]] | None:
        if challenge is None:
            return None

        async def consume(connection: Connection) -> None:
            if not await self._codes.consume(connection, challenge, proof.challenge_id):
                raise refusal([CODE_INVALID])

        return consume


def _hear_out(task: asyncio.Task[Redemption]) -> None:
    """Hear an order's error, which nobody else does where the caller has gone away."""
    if not task.cancelled():
        task.exception()


def purpose_of(ask: Ask, assessment: Assessment) -> Purpose:
    """Tell what a code for an ask is bound to."""
    group = assessment.facts.group
    return Purpose(
        merchant_id=ask.merchant_id,
        customer=assessment.facts.redeemer,
        program_id=ask.program_id,
        points=assessment.points,
        group_redemption=ask.group_redemption,
        group_id="" if group is None else group.group_id,
    )
