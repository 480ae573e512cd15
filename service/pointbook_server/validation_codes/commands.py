"""What calls do to customers' live challenges and to the counts: pure steps, on what was locked for them.

Steps of several calls run one after the other in one transaction, so that each finds what those before it have left.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeVar

from pointbook_server.errors import PointbookError
from pointbook_server.programs.model import Channel
from pointbook_server.validation_codes.model import (
    ATTEMPTS_MAX,
    Challenge,
    ChallengeState,
    Delivery,
    Family,
    KeyRing,
    Purpose,
    Route,
    delivery_failed,
    new_challenge_id,
    send_limit_reached,
)
from pointbook_server.validation_codes.rate_limits import (
    DAY_MS,
    MERCHANT_GRAIN_MS,
    MERCHANT_WINDOW_MS,
    MISSED_CALLS_OF_CUSTOMER,
    SENDS_TO_DESTINATION,
    WRONG_GUESSES_OF_CUSTOMER,
    Limit,
    SlidingWindowCounter,
)

MERCHANT_SENDS = "sends"
"""The subject of all messages of a merchant."""
HELD = "HELD"
"""The outcome where a challenge that was issued earlier still holds."""

T_co = TypeVar("T_co", covariant=True)


class Action(StrEnum):
    """What the audit tells."""

    ISSUE = "ISSUE"
    DELIVER = "DELIVER"
    GUESS = "GUESS"
    USE = "USE"
    CONFIRM = "CONFIRM"
    RESET = "RESET"
    END = "END"


class Verdict(StrEnum):
    """What became of a guess. Callers are told whether it was right, and nothing else."""

    RIGHT = "RIGHT"
    WRONG = "WRONG"
    OTHER_CHALLENGE = "OTHER_CHALLENGE"
    LOCKED = "LOCKED"
    EXPIRED = "EXPIRED"
    NO_CHALLENGE = "NO_CHALLENGE"
    KEY_UNKNOWN = "KEY_UNKNOWN"


COMPARED = {Verdict.RIGHT, Verdict.WRONG, Verdict.OTHER_CHALLENGE}
"""Guesses that the audit keeps one by one: wrong ones are limited, and right ones need the code."""


class AuditRecord(NamedTuple):
    """A line of the audit: who did what, for whom and what for, and how it ended. It holds no code and no contact.

    Lines that may be repeated without limit name a `period`: in it those of one action, outcome, customer, challenge
    and actor are one row with a count, whatever program and points they are about.
    """

    action: Action
    outcome: str
    customer: str
    challenge_id: str
    program_id: int
    points: int
    channel: str
    actor: str
    reason: str = ""
    period: str = ""


@dataclass
class LockedState:
    """What was locked for some steps, and what they make of it."""

    now_ms: int
    live: dict[tuple[str, Family], Challenge]
    """By customer and family."""
    tallies: dict[str, SlidingWindowCounter]
    challenges: dict[str, Challenge] = field(default_factory=dict)
    """Those that are to be written, in their last state."""
    opened: set[str] = field(default_factory=set)
    counted: set[str] = field(default_factory=set)
    audit: list[AuditRecord] = field(default_factory=list)

    def open(self, challenge: Challenge) -> None:
        """Put a new challenge in place of the customer's live one of its family."""
        live = self.live.get((challenge.purpose.customer, challenge.family))
        if live is not None:
            self.challenges[live.challenge_id] = replace(live, state=ChallengeState.REPLACED)
        self.opened.add(challenge.challenge_id)
        self.put(challenge)

    def put(self, challenge: Challenge) -> None:
        """Change the customer's live challenge of its family."""
        self.challenges[challenge.challenge_id] = challenge
        self.live[challenge.purpose.customer, challenge.family] = challenge

    def count(self, subject: str, tally: SlidingWindowCounter) -> None:
        """Change a count."""
        self.tallies[subject] = tally
        self.counted.add(subject)

    def tell(
        self,
        action: Action,
        outcome: str,
        purpose: Purpose,
        actor: str,
        challenge: Challenge | None,
        *,
        period: str = "",
    ) -> None:
        """Write a line of the audit."""
        challenge_id, channel = ("", "") if challenge is None else (challenge.challenge_id, challenge.channel.value)
        about = (purpose.customer, challenge_id, purpose.program_id, purpose.points, channel)
        self.audit.append(AuditRecord(action, outcome, *about, actor, period=period))


class Command(Protocol[T_co]):
    """What a call does to one customer's live challenges."""

    @property
    def customer(self) -> str:
        """Whose live challenges to lock."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """Which counts to lock."""

    def run(self, board: LockedState) -> T_co:
        """Do it."""


class SendCounter(NamedTuple):
    """Where the messages to a destination are counted: under its digest by every key, of which the first signs."""

    subjects: tuple[str, ...]

    @classmethod
    def to(cls, keys: KeyRing, merchant_id: str, destination: str) -> "SendCounter":
        """Name the counts of a destination; what goes nowhere, as to a console, is counted for the merchant alone."""
        digests = keys.destination_digests(merchant_id, destination) if destination else []
        return cls(tuple(f"sends {digest.hex()}" for digest in digests))

    def check(self, board: LockedState, merchant_max: int) -> None:
        """Raise SEND_LIMIT_REACHED where one more message would be too many."""
        counts = sorted(count for subject in self.subjects for count in board.tallies[subject].counts)
        for name, tally, limits in (
            ("destination", SlidingWindowCounter(tuple(counts)), SENDS_TO_DESTINATION),
            ("merchant", board.tallies[MERCHANT_SENDS], (Limit(merchant_max, MERCHANT_WINDOW_MS),)),
        ):
            wait_ms = tally.free_at_ms(limits, board.now_ms) - board.now_ms
            if wait_ms > 0:
                raise send_limit_reached(name, wait_ms / 1_000)

    def add(self, board: LockedState) -> None:
        """Count one more message."""
        for subject in self.subjects[:1]:
            board.count(subject, board.tallies[subject].after(board.now_ms))
        tally = board.tallies[MERCHANT_SENDS].after(
            board.now_ms, window_ms=MERCHANT_WINDOW_MS, grain_ms=MERCHANT_GRAIN_MS
        )
        board.count(MERCHANT_SENDS, tally)

    def take_back(self, board: LockedState, sent_at_ms: int) -> None:
        """Take one back that was never sent."""
        for subject in self.subjects[:1]:
            board.count(subject, board.tallies[subject].without(sent_at_ms))
        tally = board.tallies[MERCHANT_SENDS].without(sent_at_ms, grain_ms=MERCHANT_GRAIN_MS)
        board.count(MERCHANT_SENDS, tally)


class Claim(NamedTuple):
    """A customer's live challenge, and whether its code is fresh and wants to be sent: only one call is told so."""

    challenge: Challenge
    is_fresh: bool


@dataclass(frozen=True, slots=True)
class Issue:
    """Find or make the customer's live challenge for a purpose and route.

    `make` makes one with a fresh code, of a challenge_id and now. The same purpose and route keeps its challenge
    through its life, the attempts included, and gets a fresh code after the cooldown; anything else replaces the live
    challenge of the same family. A merchant sends `merchant_max` messages in ten minutes at most. Challenges for missed
    calls are limited for each customer, or requests for them could end every challenge before the call comes.
    """

    purpose: Purpose
    route: Route
    keys: KeyRing
    sends: SendCounter
    make: Callable[[str, int], Challenge]
    merchant_max: int
    actor: str

    @property
    def customer(self) -> str:
        """Whose live challenge to lock."""
        return self.purpose.customer

    @property
    def subjects(self) -> tuple[str, ...]:
        """Which counts to lock: a missed call sends nothing."""
        if self.route.channel is Channel.MISSED_CALL:
            return (missed_calls_of(self.customer),)
        return (*self.sends.subjects, MERCHANT_SENDS)

    def run(self, board: LockedState) -> Claim:
        """Claim the challenge. Raises DELIVERY_FAILED until the end of an uncertain cooldown, SEND_LIMIT_REACHED."""
        live = board.live.get((self.customer, Family.of(self.route.channel)))
        period = day_of(board.now_ms)
        try:
            claim, outcome = self._claim(board, live)
        except PointbookError as error:
            board.tell(Action.ISSUE, error.reason.value, self.purpose, self.actor, live, period=period)
            raise
        period = period if outcome == HELD else ""
        board.tell(Action.ISSUE, outcome, self.purpose, self.actor, claim.challenge, period=period)
        return claim

    def _claim(self, board: LockedState, live: Challenge | None) -> tuple[Claim, str]:
        """Claim the challenge, and tell the audit what became of that."""
        is_call = self.route.channel is Channel.MISSED_CALL
        same = live if live and live.is_for(self.purpose, self.route, self.keys, board.now_ms) else None
        if same is not None and board.now_ms < same.may_resend_at_ms:
            if same.is_uncertain(board.now_ms):
                raise delivery_failed((same.may_resend_at_ms - board.now_ms) / 1_000)
            return Claim(same, is_fresh=False), HELD
        if is_call:
            _count_missed_call(board, self.customer)
        else:
            self.sends.check(board, self.merchant_max)
            self.sends.add(board)
        fresh = self.make(new_challenge_id() if same is None else same.challenge_id, board.now_ms)
        if same is None:
            board.open(fresh)
            return Claim(fresh, is_fresh=not is_call), "OPENED"
        fresh = replace(fresh, attempts=same.attempts, unnamed_attempts=same.unnamed_attempts)
        board.put(fresh)
        return Claim(fresh, is_fresh=not is_call), "RENEWED"


def _count_missed_call(board: LockedState, customer: str) -> None:
    """Count one more challenge for a missed call. Raises SEND_LIMIT_REACHED where it is one too many."""
    subject = missed_calls_of(customer)
    tally = board.tallies[subject]
    wait_ms = tally.free_at_ms(MISSED_CALLS_OF_CUSTOMER, board.now_ms) - board.now_ms
    if wait_ms > 0:
        raise send_limit_reached("missed_calls", wait_ms / 1_000)
    board.count(subject, tally.after(board.now_ms))


@dataclass(frozen=True, slots=True)
class Deliver:
    """Keep what became of a code's message, unless a newer code was sent meanwhile."""

    challenge: Challenge
    sends: SendCounter
    delivery: Delivery
    actor: str

    @property
    def customer(self) -> str:
        """Whose live challenge to lock."""
        return self.challenge.purpose.customer

    @property
    def subjects(self) -> tuple[str, ...]:
        """Which counts to lock: what was definitely not sent counts for nothing."""
        return (*self.sends.subjects, MERCHANT_SENDS) if self.delivery is Delivery.FAILED else ()

    def run(self, board: LockedState) -> None:
        """Keep it. After a definite failure there is no cooldown."""
        live = board.live.get((self.customer, self.challenge.family))
        has_failed = self.delivery is Delivery.FAILED
        if live is not None and live.code_digest == self.challenge.code_digest:
            resend_at_ms = board.now_ms if has_failed else live.resend_at_ms
            board.put(replace(live, delivery=self.delivery, resend_at_ms=resend_at_ms))
        if has_failed:
            self.sends.take_back(board, self.challenge.sent_at_ms)
        board.tell(Action.DELIVER, self.delivery.value, self.challenge.purpose, self.actor, self.challenge)


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the audit that no code was issued, and why: there is nowhere to send it to now."""

    purpose: Purpose
    outcome: str
    actor: str

    @property
    def customer(self) -> str:
        """Whose live challenge to lock."""
        return self.purpose.customer

    @property
    def subjects(self) -> tuple[str, ...]:
        """Which counts to lock: none."""
        return ()

    def run(self, board: LockedState) -> None:
        """Tell it."""
        board.tell(Action.ISSUE, self.outcome, self.purpose, self.actor, None, period=day_of(board.now_ms))


class Answer(NamedTuple):
    """What became of a guess, and the challenge that it met."""

    verdict: Verdict
    challenge: Challenge | None = None


@dataclass(frozen=True, slots=True)
class Guess:
    """Compare a code with the customer's live challenge of sent codes, under its lock.

    A missed call has no code to guess: a guess that names its challenge names another one. Guesses that name no
    challenge, or another one, have counters of their own, so that callers who do not know the challenge_id cannot lock
    out those who do. `is_right` compares in constant time.
    """

    purpose: Purpose
    challenge_id: str
    keys: KeyRing
    is_right: Callable[[Challenge], bool]
    actor: str

    @property
    def customer(self) -> str:
        """Whose live challenge to lock."""
        return self.purpose.customer

    @property
    def subjects(self) -> tuple[str, ...]:
        """Which counts to lock."""
        return wrong_guesses_of(self.customer)

    def run(self, board: LockedState) -> Answer:
        """Judge the guess, and count it where it is wrong."""
        live = board.live.get((self.customer, Family.CODE))
        verdict = Verdict.NO_CHALLENGE if live is None else self._judge(board, live)
        period = "" if verdict in COMPARED else self._period(board, verdict)
        board.tell(Action.GUESS, verdict.value, self.purpose, self.actor, live, period=period)
        return Answer(verdict, live)

    def _period(self, board: LockedState, verdict: Verdict) -> str:
        """Name the period in which guesses that are not compared are counted together; a lock begins another one."""
        day = day_of(board.now_ms)
        if verdict is not Verdict.LOCKED:
            return day
        return f"{day} {max(board.tallies[subject].last_at_ms for subject in self.subjects)}"

    def _judge(self, board: LockedState, live: Challenge) -> Verdict:
        names_it = self.challenge_id == live.challenge_id
        subject = wrong_guesses_of(self.customer)[0 if names_it else 1]
        attempts = live.attempts if names_it else live.unnamed_attempts
        tally = board.tallies[subject]
        if board.now_ms >= live.expires_at_ms:
            return Verdict.EXPIRED
        if live.key_id not in self.keys:
            return Verdict.KEY_UNKNOWN
        is_locked = live.attempts >= ATTEMPTS_MAX or attempts >= ATTEMPTS_MAX
        if is_locked or tally.free_at_ms(WRONG_GUESSES_OF_CUSTOMER, board.now_ms) > board.now_ms:
            return Verdict.LOCKED
        is_other = bool(self.challenge_id) and not names_it
        if not is_other and self.is_right(live):
            return Verdict.RIGHT
        board.put(replace(live, attempts=attempts + 1) if names_it else replace(live, unnamed_attempts=attempts + 1))
        board.count(subject, tally.after(board.now_ms))
        return Verdict.OTHER_CHALLENGE if is_other else Verdict.WRONG


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget a customer's wrong guesses, and the messages to their contacts."""

    customer: str
    sends: tuple[SendCounter, ...]
    actor: str
    reason: str

    @property
    def subjects(self) -> tuple[str, ...]:
        """Which counts to lock."""
        sends = (subject for sends in self.sends for subject in sends.subjects)
        return (*wrong_guesses_of(self.customer), missed_calls_of(self.customer), *sends)

    def run(self, board: LockedState) -> None:
        """Forget them."""
        for subject in self.subjects:
            board.count(subject, board.tallies[subject]._replace(counts=()))
        live = board.live.get((self.customer, Family.CODE))
        if live is not None:
            board.put(replace(live, attempts=0, unnamed_attempts=0))
            told = told_of(Action.RESET, "DONE", live, self.actor)
        else:
            told = AuditRecord(Action.RESET, "DONE", self.customer, "", 0, 0, "", self.actor)
        board.audit.append(told._replace(reason=self.reason))


def wrong_guesses_of(customer: str) -> tuple[str, str]:
    """Name the counts of a customer's wrong guesses: of those that name their challenge, and of the others."""
    return f"guesses {customer}", f"unnamed guesses {customer}"


def missed_calls_of(customer: str) -> str:
    """Name the count of a customer's challenges for a missed call."""
    return f"missed calls {customer}"


def day_of(now_ms: int) -> str:
    """Name the longest period in which repeated events are counted together."""
    return f"day {now_ms // DAY_MS}"


def subjects_of(steps: Iterable[Command[object]]) -> list[str]:
    """Name all counts that some steps want locked, in the order that everybody keeps to."""
    return sorted({subject for step in steps for subject in step.subjects})


def told_of(action: Action, outcome: str, challenge: Challenge, actor: str) -> AuditRecord:
    """Write a line of the audit about a challenge."""
    purpose, channel = challenge.purpose, challenge.channel.value
    return AuditRecord(
        action,
        outcome,
        purpose.customer,
        challenge.challenge_id,
        purpose.program_id,
        purpose.points,
        channel,
        actor,
    )
