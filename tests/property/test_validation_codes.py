"""Whatever is issued, guessed and waited for: only what was sent is right, and no limit is ever passed or moved."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook_server.customers.model import Customer, Identifier, Kind
from pointbook_server.delivery.sender import DeliveryFailedError
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.metrics import Metrics
from pointbook_server.programs.model import Channel, Program, Validation
from pointbook_server.validation_codes.commands import Command, LockedState, subjects_of
from pointbook_server.validation_codes.model import (
    Challenge,
    ChallengeState,
    ChallengeSubject,
    Family,
    KeyRing,
    Purpose,
)
from pointbook_server.validation_codes.rate_limits import (
    DAY_MS,
    HOUR_MS,
    MERCHANT_GRAIN_MS,
    MERCHANT_WINDOW_MS,
    MINUTE_MS,
    MISSED_CALLS_OF_CUSTOMER,
    SENDS_TO_DESTINATION,
    WRONG_GUESSES_OF_CUSTOMER,
    Limit,
    SlidingWindowCounter,
)
from pointbook_server.validation_codes.service import Rules, ValidationCodes
from support.examples import examples
from support.harness import NOW_MS, Outbox, Service, TestClock, unique

T = TypeVar("T")

EXAMPLES = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
MOBILE = "+8613812345678"
CODES = Validation(
    code_length=10,
    alphanumeric=True,
    message_templates={"": "$code"},
    channels=(Channel.SMS, Channel.EMAIL, Channel.MISSED_CALL),
    missed_call_number="+862112345678",
)
KEYS = {"k1": b"k" * 32}


class MemoryStore:
    """Keeps challenges and counts as the database does, for one merchant."""

    def __init__(self) -> None:
        self.challenges: dict[tuple[str, Family], Challenge] = {}
        self.tallies: dict[str, SlidingWindowCounter] = {}

    async def live(self, _merchant_id: str, customer: str, family: Family) -> Challenge | None:
        """Read a customer's live challenge of a family."""
        return self.challenges.get((customer, family))

    async def run(self, _merchant_id: str, steps: Sequence[Command[T]], now_ms: int) -> list[T | PointbookError]:
        """Do steps."""
        tallies = {subject: self.tallies.get(subject, SlidingWindowCounter()) for subject in subjects_of(steps)}
        board = LockedState(now_ms, dict(self.challenges), tallies)
        answers: list[T | PointbookError] = []
        for step in steps:
            try:
                answers.append(step.run(board))
            except PointbookError as error:
                answers.append(error)
        self.challenges |= {
            (each.purpose.customer, each.family): each
            for each in board.challenges.values()
            if each.state is ChallengeState.LIVE
        }
        self.tallies |= {subject: board.tallies[subject] for subject in board.counted}
        return answers


def codes_in_memory() -> tuple[ValidationCodes, Outbox, TestClock]:
    """A service of codes without a database, where its messages go, and its clock."""
    outbox, clock, store = Outbox(), TestClock(), MemoryStore()
    rules = Rules(pause_ms=0, merchant_sends_max=1_000)
    senders = {Channel.SMS: outbox, Channel.EMAIL: outbox}
    return ValidationCodes(store, KeyRing(KEYS), senders, clock, metrics=Metrics(), rules=rules), outbox, clock  # type: ignore[arg-type] # it runs steps


def program_of(purpose: Purpose) -> Program:
    """The program of a purpose."""
    return Program(purpose.merchant_id, purpose.program_id, ("s",), validation=CODES)


def customer_of(purpose: Purpose, mobile: str = MOBILE) -> Customer:
    """The customer of a purpose, with a number and an address."""
    contacts = (Identifier(Kind.MOBILE, mobile), Identifier(Kind.EMAIL, "b@example.com"))
    return Customer(purpose.merchant_id, purpose.customer, contacts)


# What is different is wrong.


class Change(NamedTuple):
    """What a guess says of another customer than the first one, of more points, and so on."""

    customer: str
    points: int
    program_id: int
    group_redemption: bool
    group_id: str
    mobile: str
    channel: Channel | None
    named: str
    code: str

    @property
    def is_for_another(self) -> bool:
        """Whether it is for anything else than what was issued to the customer."""
        return self[1:6] != (0, 1, False, "", MOBILE) or self.channel is Channel.EMAIL


CHANGES = st.builds(
    Change,
    points=st.sampled_from([0, 0, 0, 1, -1, 10]),
    program_id=st.sampled_from([1, 1, 1, 2]),
    group_redemption=st.sampled_from([False, False, False, True]),
    group_id=st.sampled_from(["", "", "", "g"]),
    customer=st.sampled_from(["c-1", "c-1", "c-1", "c-2"]),
    mobile=st.sampled_from([MOBILE, MOBILE, MOBILE, "+8613812345679"]),
    channel=st.sampled_from([None, Channel.SMS, Channel.EMAIL]),
    named=st.sampled_from(["", "it", "it", "other"]),
    code=st.sampled_from(["same", "same", "same", "shorter", "longer", "padded", "lower", "another", "of another"]),
)


def typed(code: str, how: str, other: str) -> str:
    """Type a code, or something like it."""
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
async def test_nothing_else_is_right(changes: list[Change], points: int) -> None:
    """10,000 guesses that differ in some ways, or in none; each wrong one counts where its customer has a challenge."""
    for change in changes:
        codes, outbox, _ = codes_in_memory()
        purposes = [Purpose("m", name, 1, points) for name in ("c-1", "c-2")]
        mine, theirs = [
            (await codes.issue(ChallengeSubject(its, program_of(its), customer_of(its), "a"), Channel.SMS)).challenge
            for its in purposes
        ]
        met, sent = (mine, 0) if change.customer == "c-1" else (theirs, 1)
        guessed = Purpose(
            "m",
            change.customer,
            change.program_id,
            points + change.points,
            change.group_redemption,
            change.group_id,
        )
        named = {"": "", "it": mine.challenge_id, "other": theirs.challenge_id}[change.named]
        code = typed(outbox.messages[0].text, change.code, outbox.messages[1].text)
        proving = ChallengeSubject(guessed, program_of(guessed), customer_of(guessed, change.mobile), "a")
        found = await codes.check(proving, change.channel, named, code)

        is_right = code == outbox.messages[sent].text and named in {"", met.challenge_id} and not change.is_for_another
        assert (found is not None) is is_right
        live = await codes._store.live("m", change.customer, Family.CODE)
        assert live is not None
        counted = (live.attempts, live.unnamed_attempts)
        assert counted == ((0, 0) if is_right else (1, 0) if named == met.challenge_id else (0, 1))


# What is counted.


def brute_force(times_ms: list[int], limits: Sequence[Limit], now_ms: int) -> int:
    """Find the first moment from now at which once more is not too often."""
    for at_ms in sorted({now_ms, *(time_ms + limit.window_ms for time_ms in times_ms for limit in limits)}):
        inside = [sum(time_ms > at_ms - limit.window_ms for time_ms in times_ms) for limit in limits]
        if at_ms >= now_ms and all(count < limit.count_max for count, limit in zip(inside, limits, strict=True)):
            return at_ms
    raise AssertionError("every window ends")


WINDOWS_MS = (10 * MINUTE_MS, HOUR_MS, DAY_MS)
WAITS_MS = st.one_of(
    st.just(0),
    st.integers(1, 5_000),
    st.builds(int.__add__, st.sampled_from(WINDOWS_MS), st.integers(-1, 1)),
    st.integers(0, 2 * HOUR_MS),
)


@given(st.sampled_from([SENDS_TO_DESTINATION, WRONG_GUESSES_OF_CUSTOMER]), st.lists(WAITS_MS, max_size=40))
@settings(EXAMPLES, max_examples=examples(500))
def test_windows_slide_exactly(limits: Sequence[Limit], waits_ms: list[int]) -> None:
    """To the millisecond: when it is too often, and from when it is not any more."""
    tally, times_ms, now_ms = SlidingWindowCounter(), list[int](), NOW_MS
    for wait_ms in waits_ms:
        now_ms += wait_ms
        free_at_ms = tally.free_at_ms(limits, now_ms)
        assert free_at_ms == brute_force(times_ms, limits, now_ms)
        if free_at_ms > now_ms:
            assert tally.free_at_ms(limits, free_at_ms - 1) == free_at_ms
            now_ms = free_at_ms
        tally = tally.after(now_ms)
        times_ms.append(now_ms)


@given(st.lists(st.integers(0, MINUTE_MS), max_size=60), st.integers(1, 12))
@settings(EXAMPLES, max_examples=examples(300))
def test_a_merchant_never_sends_too_much(waits_ms: list[int], count_max: int) -> None:
    """Messages that are counted together for a while leave their window a while later, never earlier."""
    limit = Limit(count_max, MERCHANT_WINDOW_MS)
    tally, times_ms, now_ms = SlidingWindowCounter(), list[int](), NOW_MS
    for wait_ms in waits_ms:
        now_ms += wait_ms
        exact_ms = brute_force(times_ms, [limit], now_ms)
        assert 0 <= tally.free_at_ms([limit], now_ms) - exact_ms < MERCHANT_GRAIN_MS
        now_ms = tally.free_at_ms([limit], now_ms)
        tally = tally.after(now_ms, window_ms=MERCHANT_WINDOW_MS, grain_ms=MERCHANT_GRAIN_MS)
        times_ms.append(now_ms)


# All of it, one after the other.


class Act(NamedTuple):
    """Something that happens: a wait, and then a message, a missed call, some guesses, a failed message, or a reset."""

    wait_ms: int
    what: str
    times: int
    points: int
    named: str
    is_known: bool


ACTS = st.builds(
    Act,
    wait_ms=st.one_of(
        st.just(0),
        st.just(0),
        st.just(60_000),
        st.builds(
            int.__add__, st.sampled_from([60_000, 240_000, 300_000, 600_000, HOUR_MS, DAY_MS]), st.integers(-1, 1)
        ),
    ),
    what=st.sampled_from([*["issue"] * 4, "fail", *["call"] * 3, *["guess"] * 12, "reset"]),
    times=st.sampled_from([1, 1, 2, 4, 5]),
    points=st.sampled_from([100, 100, 100, 200]),
    named=st.sampled_from(["", "it", "it", "it", "old", "call"]),
    is_known=st.booleans(),
)


@dataclass
class Kept:
    """The live challenge as the tests keep it: what is right, and what was counted of it."""

    challenge_id: str
    points: int
    code: str
    resend_at_ms: int
    expires_at_ms: int
    wrong: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})


@dataclass
class World:
    """Codes of one customer, and what they must be like: kept in the plainest way."""

    codes: ValidationCodes
    outbox: Outbox
    clock: TestClock
    purpose: Purpose
    live: Kept | None = None
    old_id: str = "old"
    sent_ms: list[int] = field(default_factory=list)
    call: Kept | None = None
    called_ms: list[int] = field(default_factory=list)
    wrong_ms: defaultdict[bool, list[int]] = field(default_factory=lambda: defaultdict(list))

    def proving(self, points: int) -> ChallengeSubject:
        """Who asks for so many points."""
        purpose = replace(self.purpose, points=points)
        return ChallengeSubject(purpose, program_of(purpose), customer_of(purpose), "a")

    async def act(self, act: Act) -> None:
        """Do something, and see that it ends as it must."""
        self.clock.now_ms += act.wait_ms
        if act.what == "guess":
            for _ in range(act.times):
                await self.guess(act)
        elif act.what == "reset":
            purpose = self.purpose
            await self.codes.reset(purpose.merchant_id, purpose.customer, customer_of(purpose), "a", "why not")
            self.sent_ms, self.called_ms, self.wrong_ms = [], [], defaultdict(list)
            if self.live is not None:
                self.live.wrong = {True: 0, False: 0}
        elif act.what == "call":
            await self.ask_for_call(act.points)
        else:
            await self.issue(act.points, fails=act.what == "fail")

    async def ask_for_call(self, points: int) -> None:
        """Ask for a missed call, which neither ends a code nor counts as a message."""
        now_ms, live = self.clock.now_ms, self.call
        is_held = live is not None and live.points == points and now_ms < live.expires_at_ms
        free_at_ms = brute_force(self.called_ms, MISSED_CALLS_OF_CUSTOMER, now_ms)
        asking = self.codes.issue(self.proving(points), Channel.MISSED_CALL)
        if not is_held and free_at_ms > now_ms:
            with pytest.raises(PointbookError) as caught:
                await asking
            wait_seconds = (free_at_ms - now_ms) / 1_000
            assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.SEND_LIMIT_REACHED, wait_seconds)
            return
        issued = await asking
        challenge_id = issued.challenge.challenge_id
        assert not issued.sent
        assert (live is not None and challenge_id == live.challenge_id) is is_held
        if not is_held:
            self.called_ms.append(now_ms)
            self.call = Kept(challenge_id, points, "", resend_at_ms=now_ms, expires_at_ms=now_ms + 300_000)

    async def issue(self, points: int, *, fails: bool) -> None:
        """Ask for a code."""
        now_ms, live, count = self.clock.now_ms, self.live, len(self.outbox.messages)
        same = live if live is not None and live.points == points and now_ms < live.expires_at_ms else None
        self.outbox.error = DeliveryFailedError("no") if fails else None
        free_at_ms = brute_force(self.sent_ms, SENDS_TO_DESTINATION, now_ms)
        failure: PointbookError | None = None
        has_sent = False
        try:
            has_sent = (await self.codes.issue(self.proving(points), Channel.SMS)).sent
        except PointbookError as error:
            failure = error
        if failure is not None and free_at_ms > now_ms:
            wait_seconds = (free_at_ms - now_ms) / 1_000
            assert (failure.reason, failure.retry_after_seconds) == (Reason.SEND_LIMIT_REACHED, wait_seconds)
            return
        is_locked = same is not None and same.wrong[True] >= 5
        is_held = same is not None and now_ms < (same.expires_at_ms if is_locked else same.resend_at_ms)
        if failure is None:
            assert has_sent is not is_held
            assert is_held or free_at_ms == now_ms
        if is_held:
            assert failure is None
            assert len(self.outbox.messages) == count
            return
        assert (failure is not None) is fails
        messages = [sent.text for sent in self.outbox.messages[count:]]
        assert len(messages) == (0 if fails else 1)
        self.sent_ms += [now_ms] * len(messages)
        challenge = await self.codes._store.live(self.purpose.merchant_id, self.purpose.customer, Family.CODE)
        assert challenge is not None
        kept = Kept(
            challenge.challenge_id,
            points,
            "".join(messages),
            resend_at_ms=now_ms if fails else now_ms + 60_000,
            expires_at_ms=now_ms + 300_000,
        )
        if same is None:
            self.old_id = live.challenge_id if live is not None else "old"
        else:
            assert kept.challenge_id == same.challenge_id
            kept.wrong = same.wrong
        self.live = kept

    async def guess(self, act: Act) -> None:
        """Guess a code."""
        now_ms, live = self.clock.now_ms, self.live
        call_id = self.call.challenge_id if self.call else "call"
        named = {"": "", "old": self.old_id, "it": live.challenge_id if live else "it", "call": call_id}[act.named]
        names_it = live is not None and named == live.challenge_id
        code = live.code if live is not None and act.is_known and live.code else "2222222222"
        found = await self.codes.check(self.proving(act.points), None, named, code)
        is_right = False
        if live is not None and now_ms < live.expires_at_ms and live.wrong[True] < 5 and live.wrong[names_it] < 5:
            wrong_ms = self.wrong_ms[names_it]
            if brute_force(wrong_ms, WRONG_GUESSES_OF_CUSTOMER, now_ms) == now_ms:
                is_right = live.points == act.points and code == live.code and named in {"", live.challenge_id}
                if not is_right:
                    wrong_ms.append(now_ms)
                    live.wrong[names_it] += 1
        assert (found is not None) is is_right


@given(st.lists(ACTS, min_size=20, max_size=60))
@settings(EXAMPLES, max_examples=examples(150))
async def test_no_guess_and_no_message_too_many(acts: list[Act]) -> None:
    """Whatever comes when: what is right, what is sent, and when, is what the plainest account of it says."""
    world = World(*codes_in_memory(), Purpose("m", "customer c-1", 1, 100))
    for act in acts:
        await world.act(act)


@given(st.lists(ACTS, min_size=20, max_size=30))
@settings(EXAMPLES, max_examples=examples(20))
async def test_no_guess_and_no_message_too_many_in_the_database(service: Service, acts: list[Act]) -> None:
    """The same by the real one."""
    codes = service.server._codes
    world = World(codes, service.outbox, service.clock, Purpose(unique("merchant"), "customer c-1", 1, 100))
    try:
        for act in acts:
            await world.act(act)
    finally:
        service.clock.now_ms, service.outbox.error = NOW_MS, None
