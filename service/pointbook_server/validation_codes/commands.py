"""Commands: pure changes of a customer's locked challenges and counters.

The commands of several calls run one after the other in one transaction, so each sees the changes of those before it.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeVar

from pointbook_server.errors import PointbookError
from pointbook_server.programs.model import Channel
from pointbook_server.validation_codes.audit import (
    COUNTED_ONE_BY_ONE,
    DONE,
    HELD,
    OPENED,
    RENEWED,
    AuditAction,
    AuditRecord,
    GuessOutcome,
    challenge_record,
    day_period,
    purpose_record,
)
from pointbook_server.validation_codes.code_errors import delivery_failed, send_limit_reached
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.locked_state import MERCHANT_SENDS, LockedState, SendCounter
from pointbook_server.validation_codes.model import (
    ATTEMPTS_MAX,
    Challenge,
    ChallengeKind,
    Delivery,
    Purpose,
    Route,
    new_challenge_id,
)
from pointbook_server.validation_codes.rate_limits import MISSED_CALLS_OF_CUSTOMER, WRONG_GUESSES_OF_CUSTOMER
from pointbook_server.validation_codes.rules import is_valid_for

T_co = TypeVar("T_co", covariant=True)


class Command(Protocol[T_co]):
    """A change of one customer's live challenges."""

    @property
    def customer(self) -> str:
        """The customer whose live challenges to lock."""

    @property
    def counter_names(self) -> tuple[str, ...]:
        """The counters to lock."""

    def run(self, state: LockedState) -> T_co:
        """Change the state, and return the result."""


class IssueResult(NamedTuple):
    """A customer's live challenge, and whether this call must send its code.

    Only one of the calls that share a challenge must.
    """

    challenge: Challenge
    must_send: bool


class IssueCommand(NamedTuple):
    """Finds or makes the customer's live challenge for a purpose and route.

    The same purpose and route keeps its challenge with its attempts until it expires, and gets a fresh code after the
    cooldown. Any other purpose or route replaces the live challenge of the same kind. `make_challenge` returns one with
    a fresh code from a challenge_id and the time. `merchant_max` is the most messages of a merchant in ten minutes.
    Challenges for missed calls are limited per customer; otherwise requests could end each challenge before its call.

    Source: docs/reference/validation-codes.md#issuing-again
    """

    purpose: Purpose
    route: Route
    keys: KeyRing
    sends: SendCounter
    make_challenge: Callable[[str, int], Challenge]
    merchant_max: int
    actor: str

    @property
    def customer(self) -> str:
        """The customer whose live challenge to lock."""
        return self.purpose.customer

    @property
    def counter_names(self) -> tuple[str, ...]:
        """The counters to lock; a missed call sends no message."""
        if self.route.channel is Channel.MISSED_CALL:
            return (missed_call_counter(self.customer),)
        return (*self.sends.names, MERCHANT_SENDS)

    def run(self, state: LockedState) -> IssueResult:
        """Return the live challenge.

        Raises SEND_LIMIT_REACHED, and DELIVERY_FAILED in the cooldown of a message that may not have arrived.
        """
        live = state.live.get((self.customer, ChallengeKind.of(self.route.channel)))
        period = day_period(state.now_ms)
        try:
            result, outcome = self._find_or_make(state, live)
        except PointbookError as error:
            state.audit.append(self._record(error.reason.value, live, period))
            raise
        state.audit.append(self._record(outcome, result.challenge, period if outcome == HELD else ""))
        return result

    def _find_or_make(self, state: LockedState, live: Challenge | None) -> tuple[IssueResult, str]:
        """Return the live challenge, and the outcome for the audit."""
        is_call = self.route.channel is Channel.MISSED_CALL
        same = live if live and is_valid_for(live, self.purpose, self.route, self.keys, state.now_ms) else None
        if same is not None and state.now_ms < same.may_resend_at_ms:
            if same.is_uncertain(state.now_ms):
                raise delivery_failed((same.may_resend_at_ms - state.now_ms) / 1_000)
            return IssueResult(same, must_send=False), HELD
        if is_call:
            _count_missed_call(state, self.customer)
        else:
            self.sends.check(state, self.merchant_max)
            self.sends.add(state)
        fresh = self.make_challenge(new_challenge_id() if same is None else same.challenge_id, state.now_ms)
        if same is None:
            state.open_challenge(fresh)
            return IssueResult(fresh, must_send=not is_call), OPENED
        fresh = fresh._replace(attempts=same.attempts, unnamed_attempts=same.unnamed_attempts)
        state.update_challenge(fresh)
        return IssueResult(fresh, must_send=not is_call), RENEWED

    def _record(self, outcome: str, challenge: Challenge | None, period: str) -> AuditRecord:
        return purpose_record(AuditAction.ISSUE, outcome, self.purpose, self.actor, challenge, period=period)


def _count_missed_call(state: LockedState, customer: str) -> None:
    """Count one more challenge for a missed call. Raises SEND_LIMIT_REACHED."""
    name = missed_call_counter(customer)
    counter = state.counters[name]
    wait_ms = counter.allowed_at_ms(MISSED_CALLS_OF_CUSTOMER, state.now_ms) - state.now_ms
    if wait_ms > 0:
        raise send_limit_reached("missed_calls", wait_ms / 1_000)
    state.update_counter(name, counter.add(state.now_ms))


class RecordDeliveryCommand(NamedTuple):
    """Writes the outcome of a code's message, unless a newer code was sent meanwhile.

    Source: docs/reference/validation-codes.md#delivery
    """

    challenge: Challenge
    sends: SendCounter
    delivery: Delivery
    actor: str

    @property
    def customer(self) -> str:
        """The customer whose live challenge to lock."""
        return self.challenge.purpose.customer

    @property
    def counter_names(self) -> tuple[str, ...]:
        """The counters to lock; a message that was definitely not sent does not count."""
        return (*self.sends.names, MERCHANT_SENDS) if self.delivery is Delivery.FAILED else ()

    def run(self, state: LockedState) -> None:
        """Write the outcome. A definite failure ends the cooldown."""
        live = state.live.get((self.customer, self.challenge.kind))
        has_failed = self.delivery is Delivery.FAILED
        if live is not None and live.code_digest == self.challenge.code_digest:
            resend_at_ms = state.now_ms if has_failed else live.resend_at_ms
            state.update_challenge(live._replace(delivery=self.delivery, resend_at_ms=resend_at_ms))
        if has_failed:
            self.sends.remove(state, self.challenge.sent_at_ms)
        state.audit.append(challenge_record(AuditAction.DELIVER, self.delivery.value, self.challenge, self.actor))


class RecordRefusalCommand(NamedTuple):
    """Writes to the audit why no code was issued: no route reaches the customer now."""

    purpose: Purpose
    outcome: str
    actor: str

    @property
    def customer(self) -> str:
        """The customer whose live challenge to lock."""
        return self.purpose.customer

    @property
    def counter_names(self) -> tuple[str, ...]:
        """The counters to lock: none."""
        return ()

    def run(self, state: LockedState) -> None:
        """Write the record."""
        period = day_period(state.now_ms)
        state.audit.append(
            purpose_record(AuditAction.ISSUE, self.outcome, self.purpose, self.actor, None, period=period)
        )


class GuessResult(NamedTuple):
    """The outcome of a guess, and the live challenge that it was compared with."""

    outcome: GuessOutcome
    challenge: Challenge | None = None


class GuessCommand(NamedTuple):
    """Compares a code with the customer's live challenge, while holding its lock.

    A missed call has no code: a guess with its challenge_id names another challenge. Guesses without the live
    challenge's id have counters of their own, so that callers who do not know the id cannot lock out those who do.
    `is_right` compares in constant time.

    Source: docs/reference/validation-codes.md#attempt-limits
    """

    purpose: Purpose
    challenge_id: str
    keys: KeyRing
    is_right: Callable[[Challenge], bool]
    actor: str

    @property
    def customer(self) -> str:
        """The customer whose live challenge to lock."""
        return self.purpose.customer

    @property
    def counter_names(self) -> tuple[str, ...]:
        """The counters to lock."""
        return wrong_guess_counters(self.customer)

    def run(self, state: LockedState) -> GuessResult:
        """Compare the code, and count a wrong guess."""
        live = state.live.get((self.customer, ChallengeKind.CODE))
        outcome = GuessOutcome.NO_CHALLENGE if live is None else self._compare(state, live)
        period = "" if outcome in COUNTED_ONE_BY_ONE else self._period(state, outcome)
        state.audit.append(
            purpose_record(AuditAction.GUESS, outcome.value, self.purpose, self.actor, live, period=period)
        )
        return GuessResult(outcome, live)

    def _period(self, state: LockedState, outcome: GuessOutcome) -> str:
        """Return the period in which uncompared guesses are counted together.

        Each lock starts a new period.
        """
        day = day_period(state.now_ms)
        if outcome is not GuessOutcome.LOCKED:
            return day
        return f"{day} {max(state.counters[name].last_at_ms for name in self.counter_names)}"

    def _compare(self, state: LockedState, live: Challenge) -> GuessOutcome:
        names_live = self.challenge_id == live.challenge_id
        counter_name = wrong_guess_counters(self.customer)[0 if names_live else 1]
        attempts = live.attempts if names_live else live.unnamed_attempts
        counter = state.counters[counter_name]
        if state.now_ms >= live.expires_at_ms:
            return GuessOutcome.EXPIRED
        if live.key_id not in self.keys:
            return GuessOutcome.KEY_UNKNOWN
        is_locked = live.attempts >= ATTEMPTS_MAX or attempts >= ATTEMPTS_MAX
        if is_locked or counter.allowed_at_ms(WRONG_GUESSES_OF_CUSTOMER, state.now_ms) > state.now_ms:
            return GuessOutcome.LOCKED
        names_other = bool(self.challenge_id) and not names_live
        if not names_other and self.is_right(live):
            return GuessOutcome.RIGHT
        counted = live._replace(attempts=attempts + 1) if names_live else live._replace(unnamed_attempts=attempts + 1)
        state.update_challenge(counted)
        state.update_counter(counter_name, counter.add(state.now_ms))
        return GuessOutcome.OTHER_CHALLENGE if names_other else GuessOutcome.WRONG


class ResetCommand(NamedTuple):
    """Resets a customer's counters of guesses, missed calls and messages."""

    customer: str
    sends: tuple[SendCounter, ...]
    actor: str
    reason: str

    @property
    def counter_names(self) -> tuple[str, ...]:
        """The counters to lock."""
        send_names = (name for sends in self.sends for name in sends.names)
        return (*wrong_guess_counters(self.customer), missed_call_counter(self.customer), *send_names)

    def run(self, state: LockedState) -> None:
        """Reset the counters and the attempts of the live challenge."""
        for name in self.counter_names:
            state.update_counter(name, state.counters[name]._replace(counts=()))
        live = state.live.get((self.customer, ChallengeKind.CODE))
        if live is not None:
            state.update_challenge(live._replace(attempts=0, unnamed_attempts=0))
            record = challenge_record(AuditAction.RESET, DONE, live, self.actor)
        else:
            record = AuditRecord(AuditAction.RESET, DONE, self.customer, "", 0, 0, "", self.actor)
        state.audit.append(record._replace(reason=self.reason))


def wrong_guess_counters(customer: str) -> tuple[str, str]:
    """Return the names of a customer's two counters of wrong guesses.

    The first counts guesses that name their challenge, the second all others.
    """
    return f"guesses {customer}", f"unnamed guesses {customer}"


def missed_call_counter(customer: str) -> str:
    """Return the name of the counter of a customer's challenges for a missed call."""
    return f"missed calls {customer}"


def counter_names_of(commands: Iterable[Command[object]]) -> list[str]:
    """Return the names of the counters to lock for some commands, in lock order."""
    return sorted({name for command in commands for name in command.counter_names})
