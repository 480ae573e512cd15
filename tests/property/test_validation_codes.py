"""Properties of one-time codes: only the sent code is right, limits are exact."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook_common.durations import DAY_MS, HOUR_MS, MINUTE_MS
from pointbook_server.customers.model import Customer, Identifier, IdentifierKind
from pointbook_server.delivery.sender import DeliveryFailedError
from pointbook_server.errors import PointbookError
from pointbook_server.metrics import Metrics
from pointbook_server.programs.model import Channel, Program, ValidationSettings
from pointbook_server.reasons import Reason
from pointbook_server.validation_codes.commands import Command, counter_names_of
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.locked_state import LockedState
from pointbook_server.validation_codes.model import (
    Challenge,
    ChallengeKind,
    ChallengeState,
    ChallengeSubject,
    Purpose,
)
from pointbook_server.validation_codes.rate_limits import (
    MERCHANT_GRAIN_MS,
    MERCHANT_WINDOW_MS,
    MISSED_CALLS_OF_CUSTOMER,
    SENDS_TO_DESTINATION,
    WRONG_GUESSES_OF_CUSTOMER,
    Limit,
    SlidingWindowCounter,
)
from pointbook_server.validation_codes.service import CodePolicy, ValidationCodes
from support.clocks import NOW_MS, TestClock
from support.examples import examples
from support.outbox import Outbox
from support.servers import Service
from support.unique_names import unique

T = TypeVar("T")

EXAMPLES = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
MOBILE = "+8613812345678"
CODES = ValidationSettings(
    code_length=10,
    alphanumeric=True,
    message_templates={"": "$code"},
    channels=(Channel.SMS, Channel.EMAIL, Channel.MISSED_CALL),
    missed_call_number="+862112345678",
)
KEYS = {"k1": b"k" * 32}


class MemoryTransactions:
    """The challenges and counters of one merchant, stored in memory."""

    def __init__(self) -> None:
        self.challenges: dict[tuple[str, ChallengeKind], Challenge] = {}
        self.counters: dict[str, SlidingWindowCounter] = {}

    async def read_live(self, _merchant_id: str, customer: str, kind: ChallengeKind) -> Challenge | None:
        """Return a customer's live challenge of a kind."""
        return self.challenges.get((customer, kind))

    async def run(self, _merchant_id: str, commands: Sequence[Command[T]], now_ms: int) -> list[T | PointbookError]:
        """Run the commands."""
        counters = {name: self.counters.get(name, SlidingWindowCounter()) for name in counter_names_of(commands)}
        state = LockedState(now_ms, dict(self.challenges), counters)
        results: list[T | PointbookError] = []
        for command in commands:
            try:
                results.append(command.run(state))
            except PointbookError as error:
                results.append(error)
        self.challenges |= {
            (challenge.purpose.customer, challenge.kind): challenge
            for challenge in state.changed_challenges.values()
            if challenge.state is ChallengeState.LIVE
        }
        self.counters |= {name: state.counters[name] for name in state.changed_counters}
        return results


def build_codes() -> tuple[ValidationCodes, Outbox, TestClock]:
    """Build ValidationCodes without a database, with its outbox and clock."""
    outbox, clock, transactions = Outbox(), TestClock(), MemoryTransactions()
    policy = CodePolicy(contact_pause_ms=0, merchant_sends_max=1_000)
    senders = {Channel.SMS: outbox, Channel.EMAIL: outbox}
    return ValidationCodes(transactions, KeyRing(KEYS), senders, clock, metrics=Metrics(), policy=policy), outbox, clock  # type: ignore[arg-type] # a stand-in


def program_of(purpose: Purpose) -> Program:
    """Return the program of a purpose."""
    return Program(purpose.merchant_id, purpose.program_id, ("s",), validation=CODES)


def customer_of(purpose: Purpose, mobile: str = MOBILE) -> Customer:
    """Return the customer of a purpose, with a number and an address."""
    contacts = (Identifier(IdentifierKind.MOBILE, mobile), Identifier(IdentifierKind.EMAIL, "b@example.com"))
    return Customer(purpose.merchant_id, purpose.customer, contacts)


# Guesses.


class GuessChange(NamedTuple):
    """How a guess differs from the issued code."""

    customer: str
    points: int
    program_id: int
    group_redemption: bool
    group_id: str
    mobile: str
    channel: Channel | None
    challenge: str
    code: str

    @property
    def is_for_other_purpose(self) -> bool:
        """Whether the guess is for anything else than the purpose of the issued code."""
        return self[1:6] != (0, 1, False, "", MOBILE) or self.channel is Channel.EMAIL


CHANGES = st.builds(
    GuessChange,
    points=st.sampled_from([0, 0, 0, 1, -1, 10]),
    program_id=st.sampled_from([1, 1, 1, 2]),
    group_redemption=st.sampled_from([False, False, False, True]),
    group_id=st.sampled_from(["", "", "", "g"]),
    customer=st.sampled_from(["c-1", "c-1", "c-1", "c-2"]),
    mobile=st.sampled_from([MOBILE, MOBILE, MOBILE, "+8613812345679"]),
    channel=st.sampled_from([None, Channel.SMS, Channel.EMAIL]),
    challenge=st.sampled_from(["", "it", "it", "other"]),
    code=st.sampled_from(["same", "same", "same", "shorter", "longer", "padded", "lower", "another", "of another"]),
)


def type_code(code: str, how: str, other: str) -> str:
    """Return a code as it is, or changed."""
    ways = {
        "same": code,
        "shorter": code[:-1],
        "longer": f"{code}2",
        "padded": f" {code}",
        "lower": code.lower() + "x",
        "another": "2" * len(code),
        "of another": other,
    }
    return ways[how]


@given(st.lists(CHANGES, min_size=50, max_size=50), st.integers(20, 500))
@settings(EXAMPLES, max_examples=examples(200))
async def test_only_the_issued_code_for_its_purpose_is_right(changes: list[GuessChange], points: int) -> None:
    """10,000 guesses that differ in some ways or in none.

    Each wrong guess counts if its customer has a challenge.
    """
    for change in changes:
        codes, outbox, _ = build_codes()
        purposes = [Purpose("m", name, 1, points) for name in ("c-1", "c-2")]
        subjects = [ChallengeSubject(each, program_of(each), customer_of(each), "a") for each in purposes]
        mine, theirs = [(await codes.issue(subject, Channel.SMS)).challenge for subject in subjects]
        challenge, message_index = (mine, 0) if change.customer == "c-1" else (theirs, 1)
        guessed = Purpose(
            "m",
            change.customer,
            change.program_id,
            points + change.points,
            change.group_redemption,
            change.group_id,
        )
        challenge_id = {"": "", "it": mine.challenge_id, "other": theirs.challenge_id}[change.challenge]
        code = type_code(outbox.messages[0].text, change.code, outbox.messages[1].text)
        guess = ChallengeSubject(guessed, program_of(guessed), customer_of(guessed, change.mobile), "a")
        found = await codes.check(guess, change.channel, challenge_id, code)

        is_right = (
            code == outbox.messages[message_index].text
            and challenge_id in {"", challenge.challenge_id}
            and not change.is_for_other_purpose
        )
        assert (found is not None) is is_right
        live = await codes._transactions.read_live("m", change.customer, ChallengeKind.CODE)
        assert live is not None
        counted = (live.attempts, live.unnamed_attempts)
        assert counted == ((0, 0) if is_right else (1, 0) if challenge_id == challenge.challenge_id else (0, 1))


# Limits.


def allowed_at_ms(times_ms: list[int], limits: Sequence[Limit], now_ms: int) -> int:
    """Return the earliest allowed time of one more event, by brute force."""
    for at_ms in sorted({now_ms, *(time_ms + limit.window_ms for time_ms in times_ms for limit in limits)}):
        inside = [sum(time_ms > at_ms - limit.window_ms for time_ms in times_ms) for limit in limits]
        if at_ms >= now_ms and all(count < limit.count_max for count, limit in zip(inside, limits, strict=True)):
            return at_ms
    raise AssertionError("every window ends at some time")


WINDOWS_MS = (10 * MINUTE_MS, HOUR_MS, DAY_MS)
WAITS_MS = st.one_of(
    st.just(0),
    st.integers(1, 5_000),
    st.builds(int.__add__, st.sampled_from(WINDOWS_MS), st.integers(-1, 1)),
    st.integers(0, 2 * HOUR_MS),
)


@given(st.sampled_from([SENDS_TO_DESTINATION, WRONG_GUESSES_OF_CUSTOMER]), st.lists(WAITS_MS, max_size=40))
@settings(EXAMPLES, max_examples=examples(500))
def test_sliding_windows_are_exact_to_the_millisecond(limits: Sequence[Limit], waits_ms: list[int]) -> None:
    counter, times_ms, now_ms = SlidingWindowCounter(), list[int](), NOW_MS
    for wait_ms in waits_ms:
        now_ms += wait_ms
        allowed_ms = counter.allowed_at_ms(limits, now_ms)
        assert allowed_ms == allowed_at_ms(times_ms, limits, now_ms)
        if allowed_ms > now_ms:
            assert counter.allowed_at_ms(limits, allowed_ms - 1) == allowed_ms
            now_ms = allowed_ms
        counter = counter.add(now_ms)
        times_ms.append(now_ms)


@given(st.lists(st.integers(0, MINUTE_MS), max_size=60), st.integers(1, 12))
@settings(EXAMPLES, max_examples=examples(300))
def test_merchant_counter_never_allows_too_early(waits_ms: list[int], count_max: int) -> None:
    """A grouped event leaves its window up to one grain late, never early."""
    limit = Limit(count_max, MERCHANT_WINDOW_MS)
    counter, times_ms, now_ms = SlidingWindowCounter(), list[int](), NOW_MS
    for wait_ms in waits_ms:
        now_ms += wait_ms
        exact_ms = allowed_at_ms(times_ms, [limit], now_ms)
        assert 0 <= counter.allowed_at_ms([limit], now_ms) - exact_ms < MERCHANT_GRAIN_MS
        now_ms = counter.allowed_at_ms([limit], now_ms)
        counter = counter.add(now_ms, window_ms=MERCHANT_WINDOW_MS, grain_ms=MERCHANT_GRAIN_MS)
        times_ms.append(now_ms)


# Sequences of calls.


class Step(NamedTuple):
    """A wait, and then an action."""

    wait_ms: int
    action: str
    times: int
    points: int
    challenge: str
    is_known: bool


STEPS = st.builds(
    Step,
    wait_ms=st.one_of(
        st.just(0),
        st.just(0),
        st.just(60_000),
        st.builds(
            int.__add__, st.sampled_from([60_000, 240_000, 300_000, 600_000, HOUR_MS, DAY_MS]), st.integers(-1, 1)
        ),
    ),
    action=st.sampled_from([*["issue"] * 4, "fail", *["call"] * 3, *["guess"] * 12, "reset"]),
    times=st.sampled_from([1, 1, 2, 4, 5]),
    points=st.sampled_from([100, 100, 100, 200]),
    challenge=st.sampled_from(["", "it", "it", "it", "old", "call"]),
    is_known=st.booleans(),
)


@dataclass
class ExpectedChallenge:
    """The live challenge as the model expects it."""

    challenge_id: str
    points: int
    code: str
    resend_at_ms: int
    expires_at_ms: int
    wrong: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})


@dataclass
class Model:
    """The expected state of one customer's codes, computed in the simplest way."""

    codes: ValidationCodes
    outbox: Outbox
    clock: TestClock
    purpose: Purpose
    live_code: ExpectedChallenge | None = None
    old_id: str = "old"
    sent_ms: list[int] = field(default_factory=list)
    call: ExpectedChallenge | None = None
    called_ms: list[int] = field(default_factory=list)
    wrong_ms: defaultdict[bool, list[int]] = field(default_factory=lambda: defaultdict(list))

    def subject(self, points: int) -> ChallengeSubject:
        """Return the subject of a redemption of some points."""
        purpose = self.purpose._replace(points=points)
        return ChallengeSubject(purpose, program_of(purpose), customer_of(purpose), "a")

    async def run(self, step: Step) -> None:
        """Run a step, and check its result."""
        self.clock.now_ms += step.wait_ms
        if step.action == "guess":
            for _ in range(step.times):
                await self.guess(step)
        elif step.action == "reset":
            purpose = self.purpose
            await self.codes.reset(purpose.merchant_id, purpose.customer, customer_of(purpose), "a", "why not")
            self.sent_ms, self.called_ms, self.wrong_ms = [], [], defaultdict(list)
            if self.live_code is not None:
                self.live_code.wrong = {True: 0, False: 0}
        elif step.action == "call":
            await self.issue_call(step.points)
        else:
            await self.issue_code(step.points, fails=step.action == "fail")

    async def issue_call(self, points: int) -> None:
        """Request a missed call, which neither ends a code nor counts as a message."""
        now_ms, live = self.clock.now_ms, self.call
        is_held = live is not None and live.points == points and now_ms < live.expires_at_ms
        allowed_ms = allowed_at_ms(self.called_ms, MISSED_CALLS_OF_CUSTOMER, now_ms)
        request = self.codes.issue(self.subject(points), Channel.MISSED_CALL)
        if not is_held and allowed_ms > now_ms:
            with pytest.raises(PointbookError) as caught:
                await request
            wait_seconds = (allowed_ms - now_ms) / 1_000
            assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.SEND_LIMIT_REACHED, wait_seconds)
            return
        issued = await request
        challenge_id = issued.challenge.challenge_id
        assert not issued.sent
        assert (live is not None and challenge_id == live.challenge_id) is is_held
        if not is_held:
            self.called_ms.append(now_ms)
            self.call = ExpectedChallenge(challenge_id, points, "", resend_at_ms=now_ms, expires_at_ms=now_ms + 300_000)

    async def issue_code(self, points: int, *, fails: bool) -> None:
        """Request a code."""
        now_ms, live, count = self.clock.now_ms, self.live_code, len(self.outbox.messages)
        same = live if live is not None and live.points == points and now_ms < live.expires_at_ms else None
        self.outbox.error = DeliveryFailedError("no") if fails else None
        allowed_ms = allowed_at_ms(self.sent_ms, SENDS_TO_DESTINATION, now_ms)
        failure: PointbookError | None = None
        has_sent = False
        try:
            has_sent = (await self.codes.issue(self.subject(points), Channel.SMS)).sent
        except PointbookError as error:
            failure = error
        if failure is not None and allowed_ms > now_ms:
            wait_seconds = (allowed_ms - now_ms) / 1_000
            assert (failure.reason, failure.retry_after_seconds) == (Reason.SEND_LIMIT_REACHED, wait_seconds)
            return
        is_locked = same is not None and same.wrong[True] >= 5
        is_held = same is not None and now_ms < (same.expires_at_ms if is_locked else same.resend_at_ms)
        if failure is None:
            assert has_sent is not is_held
            assert is_held or allowed_ms == now_ms
        if is_held:
            assert failure is None
            assert len(self.outbox.messages) == count
            return
        assert (failure is not None) is fails
        messages = [sent.text for sent in self.outbox.messages[count:]]
        assert len(messages) == (0 if fails else 1)
        self.sent_ms += [now_ms] * len(messages)
        challenge = await self.codes._transactions.read_live(
            self.purpose.merchant_id, self.purpose.customer, ChallengeKind.CODE
        )
        assert challenge is not None
        expected = ExpectedChallenge(
            challenge.challenge_id,
            points,
            "".join(messages),
            resend_at_ms=now_ms if fails else now_ms + 60_000,
            expires_at_ms=now_ms + 300_000,
        )
        if same is None:
            self.old_id = live.challenge_id if live is not None else "old"
        else:
            assert expected.challenge_id == same.challenge_id
            expected.wrong = same.wrong
        self.live_code = expected

    async def guess(self, step: Step) -> None:
        """Guess a code."""
        now_ms, live = self.clock.now_ms, self.live_code
        call_id = self.call.challenge_id if self.call else "call"
        challenge_id = {"": "", "old": self.old_id, "it": live.challenge_id if live else "it", "call": call_id}[
            step.challenge
        ]
        names_it = live is not None and challenge_id == live.challenge_id
        code = live.code if live is not None and step.is_known and live.code else "2222222222"
        found = await self.codes.check(self.subject(step.points), None, challenge_id, code)
        is_right = False
        if live is not None and now_ms < live.expires_at_ms and live.wrong[True] < 5 and live.wrong[names_it] < 5:
            wrong_ms = self.wrong_ms[names_it]
            if allowed_at_ms(wrong_ms, WRONG_GUESSES_OF_CUSTOMER, now_ms) == now_ms:
                is_right = live.points == step.points and code == live.code and challenge_id in {"", live.challenge_id}
                if not is_right:
                    wrong_ms.append(now_ms)
                    live.wrong[names_it] += 1
        assert (found is not None) is is_right


@given(st.lists(STEPS, min_size=20, max_size=60))
@settings(EXAMPLES, max_examples=examples(150))
async def test_codes_behave_like_the_model(steps: list[Step]) -> None:
    model = Model(*build_codes(), Purpose("m", "customer c-1", 1, 100))
    for step in steps:
        await model.run(step)


@given(st.lists(STEPS, min_size=20, max_size=30))
@settings(EXAMPLES, max_examples=examples(20))
async def test_codes_behave_like_the_model_in_the_database(service: Service, steps: list[Step]) -> None:
    codes = service.server.services.codes
    model = Model(codes, service.outbox, service.clock, Purpose(unique("merchant"), "customer c-1", 1, 100))
    try:
        for step in steps:
            await model.run(step)
    finally:
        service.clock.now_ms, service.outbox.error = NOW_MS, None
