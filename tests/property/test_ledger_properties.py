"""The ledger's promise on the pure domain: the account is a function of the set of events, whatever way they come.

True histories come from a small model of SHOPLINE that knows its own points by their expiry and books every change;
the ledger must find the same points again from nothing but the events.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, permutations, takewhile

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pointbook_server.ledger.journal import Journal
from pointbook_server.ledger.model import Account, AccountKey, Entry, Event, Outcome, UpdateType, fold

ACCOUNT = AccountKey("store", "buyer")
POINTS_EXPIRED = "POINTS_EXPIRED"
NEVER = float("inf")


@dataclass
class Book:
    """A book in memory: what the store keeps of one account, fed through the same judgement."""

    account: Account = field(default_factory=Account)
    entries: dict[str, Entry] = field(default_factory=dict)
    refused: dict[str, Event] = field(default_factory=dict)

    @property
    def history(self) -> list[Entry]:
        """The entries in the order of the book."""
        return sorted(self.entries.values(), key=lambda entry: (entry.event.updated_at_ms, entry.ordinal))

    def apply(self, event: Event) -> Outcome:
        """Write one event into the book."""
        if event.event_id in self.entries:
            return Outcome.DUPLICATE
        if event.event_id in self.refused:
            return Outcome.REFUSED
        direct = self.account.is_before(event.updated_at_ms)
        journal = Journal(self.account) if direct else Journal(Account(), self.history)
        journal.post(event)
        posting = journal.close()
        (verdict,) = posting.verdicts
        if verdict.outcome is Outcome.REFUSED:
            self.refused[event.event_id] = event
        if verdict.outcome in {Outcome.APPLIED, Outcome.LATE}:
            self.account = posting.account
            self.entries |= {entry.event.event_id: entry for entry in (verdict.entry, *posting.moved)}
        return verdict.outcome


@dataclass
class Shopline:
    """Who owns the points: what it holds by expiry, and the events that it has sent."""

    balance: int
    points: Counter[float]
    events: list[Event]
    silently_expired: int = 0
    lifetime_points: int = 0

    @classmethod
    def opened(cls, opening: int) -> "Shopline":
        """An account with points from before the first event."""
        held = max(opening, 0)
        return cls(opening, Counter({NEVER: held}), [], lifetime_points=held)

    def expired_points(self, at_ms: int) -> int:
        """Points that have expired by then and are still in the balance."""
        return sum(points for expiry, points in self.points.items() if expiry <= at_ms)

    def expire_silently(self, by_ms: int) -> None:
        """Take what has expired, without telling anybody."""
        expired = self.expired_points(by_ms)
        self.points = Counter({expiry: points for expiry, points in self.points.items() if expiry > by_ms})
        self.balance -= expired
        self.silently_expired += expired

    def book(self, event: Event) -> None:
        """Move the points by an event, which is told."""
        self.balance += event.delta
        at_ms = event.updated_at_ms
        if event.update_type is UpdateType.INCREASE:
            self.points[NEVER if event.expires_at_ms is None else event.expires_at_ms] += event.value
            self.lifetime_points += event.value
        else:
            self._take(event.value, at_ms, expired_first=event.scene == POINTS_EXPIRED)
        self._take(self.points.total() - max(self.balance, 0), at_ms, expired_first=True)
        self.events.append(event)

    def held(self, at_ms: int) -> Counter[float]:
        """What is held by expiry, expired points as one: nothing tells them apart any more."""
        held: Counter[float] = Counter()
        for expiry, points in self.points.items():
            held[max(expiry, at_ms)] += points
        return +held

    def _take(self, points: int, at_ms: int, *, expired_first: bool) -> None:
        for expiry in sorted(self.points, key=lambda expiry: ((expiry <= at_ms) != expired_first, expiry)):
            taken = max(min(points, self.points[expiry]), 0)
            self.points[expiry] -= taken
            points -= taken


@dataclass(frozen=True)
class Move:
    """One change that a shop makes, before its balance is known."""

    update_type: UpdateType
    value: int
    life_ms: int | None
    scene: str


moves = st.one_of(
    st.builds(
        Move,
        st.just(UpdateType.INCREASE),
        st.integers(0, 12),
        st.sampled_from([None, 0, 1, 2, 3, 5, 9]),
        st.sampled_from(["SUCCESSFUL_ORDERS", "LUCKY_DRAW"]),
    ),
    st.builds(
        Move,
        st.just(UpdateType.DECREASE),
        st.integers(0, 16),
        st.none(),
        st.sampled_from(["REDEEM_COUPON", POINTS_EXPIRED]),
    ),
)


@dataclass(frozen=True)
class Millisecond:
    """What happens in one millisecond: silent expiry up to some time before it, then changes.

    With `returns` a last change leads back to the balance that it began with.
    """

    moves: tuple[Move, ...]
    after_ms: int
    silent_until_ms: int | None
    returns: bool


milliseconds = st.builds(
    Millisecond,
    st.lists(moves, min_size=1, max_size=5).map(tuple),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(0, 2)),
    st.booleans(),
)


def smallest_trail(events: Sequence[Event], start: int) -> list[Event]:
    """Of all orders that fit the balances, return the one that the ledger defines, by trying every one."""

    def content(event: Event) -> tuple[object, ...]:
        expiry = NEVER if event.expires_at_ms is None else event.expires_at_ms
        return (event.delta, event.balance, expiry, event.scene)

    def follows(order: Sequence[Event]) -> bool:
        balances = [start, *(event.balance for event in order)]
        return all(
            before is not None and before + event.delta == event.balance
            for before, event in zip(balances, order, strict=False)
        )

    orders = [order for order in permutations(events) if follows(order)]
    return list(min(orders, key=lambda order: [content(event) for event in order]))


def play(shop: Shopline, happening: Millisecond, at_ms: int) -> Shopline | None:
    """Let a millisecond happen; None where it is one of the ledger's known limits."""
    after = replace(shop, points=shop.points.copy(), events=[*shop.events])
    if happening.silent_until_ms is not None:
        after.expire_silently(at_ms - happening.silent_until_ms)
    is_silent = after.balance < shop.balance
    start = balance = after.balance
    events: list[Event] = []
    for number, move in enumerate(happening.moves):
        is_expiry = move.scene == POINTS_EXPIRED
        value = min(move.value, after.expired_points(at_ms)) if is_expiry else move.value
        expires_at_ms = None if move.life_ms is None else at_ms + move.life_ms
        event_id = f"{at_ms}-{number}"
        event = Event(event_id, ACCOUNT, move.update_type, move.scene, value, None, expires_at_ms, at_ms)
        balance += event.delta
        events.append(replace(event, balance=balance))
    if happening.returns:
        update_type = UpdateType.INCREASE if start >= balance else UpdateType.DECREASE
        back = abs(start - balance)
        events.append(Event(f"{at_ms}-back", ACCOUNT, update_type, "MANUALLY", back, start, None, at_ms))
        balance = start
    if len({event.content for event in events}) < len(events):
        return None  # Two identical events of one millisecond count once.
    trail = smallest_trail(events, start)
    is_loop = len(trail) > 1 and balance == start
    if is_loop and not shop.events:
        return None  # Nobody can order an account's first millisecond when it is a loop.
    if is_silent:
        # Where a loop starts, only the balance before tells, and that has changed unseen.
        is_partial = after.expired_points(at_ms) > 0
        if is_loop and (is_partial or shop.balance in {event.balance for event in trail}):
            return None
        # Expired points are gone before the event, but the fold lets the event draw on them.
        first = trail[0]
        if first.update_type is UpdateType.DECREASE and (first.scene == POINTS_EXPIRED or first.value > start):
            return None
    for event in trail:
        after.book(event)
    return after


@st.composite
def true_histories(draw: st.DrawFn, count_max: int = 5) -> Shopline:
    """What a shop did: every event was sent, and every balance in it was right."""
    shop = Shopline.opened(draw(st.integers(-10, 30)))
    at_ms = 1_000
    for happening in draw(st.lists(milliseconds, min_size=1, max_size=count_max)):
        at_ms += happening.after_ms
        alone = replace(happening, moves=happening.moves[:1], silent_until_ms=None, returns=False)
        after = play(shop, happening, at_ms) or play(shop, alone, at_ms)
        assert after is not None, "one event alone is never a known limit"
        shop = after
    return shop


free_events = st.builds(
    Event,
    event_id=st.uuids().map(str),
    account=st.just(ACCOUNT),
    update_type=st.sampled_from(UpdateType),
    scene=st.sampled_from(["SUCCESSFUL_ORDERS", POINTS_EXPIRED, "LUCKY_DRAW"]),
    value=st.integers(0, 6),
    balance=st.one_of(st.none(), st.integers(-4, 12)),
    expires_at_ms=st.one_of(st.none(), st.integers(1_000, 1_012)),
    updated_at_ms=st.integers(1_000, 1_006),
)
balanced_events = free_events.filter(lambda event: event.balance is not None)


def check_invariants(account: Account, entries: Sequence[Entry]) -> None:
    """What holds always, for the account and for every entry."""
    deltas = sum(entry.event.delta for entry in entries)
    assert account.balance == (account.opening or 0) + deltas - account.silently_expired + account.drift
    assert sum(lot.remaining for lot in account.lots) == max(account.balance, 0)
    assert all(0 < lot.remaining <= lot.original for lot in account.lots)
    assert account.drift == sum(entry.drift for entry in entries)
    assert account.silently_expired == sum(entry.silently_expired for entry in entries)
    for entry in entries:
        moved = entry.balance_before + entry.event.delta - entry.silently_expired + entry.drift
        assert entry.balance_after == moved
        assert entry.event.balance in {None, entry.balance_after}
        assert entry.silently_expired >= 0
    for before, after in pairwise(entries):
        assert before.balance_after == after.balance_before
    for at_ms in range(1_000, 1_014):
        active, expired = account.points_at(at_ms)
        assert active >= 0
        assert active <= max(account.balance, 0) - expired


def check_is_the_fold(book: Book) -> None:
    """The book is what the fold over its events says, every derived value included."""
    history = book.history
    account, entries = fold(Account(), [entry.event for entry in history])
    assert book.account == account
    assert history == entries


def without_ids(account: Account) -> Account:
    """An account but for the ids of its lots: of two ids for one content, the first to arrive names the event."""
    return replace(account, lots=tuple(lot._replace(event_id="") for lot in account.lots))


def fed(events: Iterable[Event]) -> Book:
    """Write events into a new book."""
    book = Book()
    for event in events:
        book.apply(event)
    return book


@given(true_histories())
@settings(max_examples=80, deadline=None)
def test_the_fold_finds_the_points_that_shopline_holds(shop: Shopline) -> None:
    """Balance, lots by expiry, silent expiry and lifetime points are SHOPLINE's own, and nothing drifts."""
    account, entries = fold(Account(), shop.events)

    assert account.drift == 0
    assert account.balance == shop.balance
    assert [entry.event for entry in entries] == shop.events
    at_ms = shop.events[-1].updated_at_ms
    held: Counter[float] = Counter()
    for lot in account.lots:
        held[NEVER if lot.expires_at_ms is None else max(lot.expires_at_ms, at_ms)] += lot.remaining
    assert held == shop.held(at_ms)
    assert account.silently_expired == shop.silently_expired
    assert account.lifetime_points == shop.lifetime_points
    check_invariants(account, entries)


@given(true_histories(), st.data())
@settings(max_examples=100, deadline=None)
def test_any_order_and_any_repetition_give_the_same_account(shop: Shopline, data: st.DataObject) -> None:
    """However webhooks come, the account is the one that they would have made in time, without drift."""
    again = data.draw(st.lists(st.sampled_from(shop.events), max_size=6))
    renamed = [replace(event, event_id=f"again:{event.event_id}") for event in again]
    arrivals = data.draw(st.permutations([*shop.events, *again, *renamed]))

    book = Book()
    outcomes = [book.apply(event) for event in arrivals]

    assert without_ids(book.account) == without_ids(fold(Account(), shop.events)[0])
    assert book.account.drift == 0
    assert [entry.event.content for entry in book.history] == [event.content for event in shop.events]
    assert outcomes.count(Outcome.DUPLICATE) == len(arrivals) - len(shop.events)
    check_is_the_fold(book)


@given(true_histories(), st.data())
@settings(max_examples=100, deadline=None)
def test_missing_events_drift_until_they_arrive(shop: Shopline, data: st.DataObject) -> None:
    """With any part of a history the invariants hold after every event; with the rest of it the drift is gone."""
    arrivals = data.draw(st.permutations(shop.events))

    book = Book()
    for event in arrivals:
        book.apply(event)
        check_invariants(book.account, book.history)
        check_is_the_fold(book)

    assert book.account.drift == 0
    assert book.account == fold(Account(), shop.events)[0]


@given(true_histories(), st.data())
@settings(max_examples=80, deadline=None)
def test_increases_without_a_balance_do_not_depend_on_the_order_either(shop: Shopline, data: st.DataObject) -> None:
    """Where nothing can go below zero, other callers' events may arrive at any place among SHOPLINE's."""
    balances = [fold(Account(), shop.events[:1])[0].opening or 0, *(event.balance or 0 for event in shop.events)]
    assume(min(balances) >= 0)
    value, at_ms = data.draw(st.integers(0, 9)), data.draw(st.sampled_from(shop.events)).updated_at_ms
    other = Event("other", ACCOUNT, UpdateType.INCREASE, "LUCKY_DRAW", value, None, None, at_ms)
    arrivals = data.draw(st.permutations([*shop.events, other]))

    book = fed(arrivals)

    assert book.refused == {}
    assert book.account == fold(Account(), [*shop.events, other])[0]
    check_is_the_fold(book)


@given(st.lists(free_events, max_size=10))
@settings(max_examples=80, deadline=None)
def test_whatever_comes_the_book_is_the_fold_of_what_it_accepted(events: list[Event]) -> None:
    """Also of events that no true history has: applied directly or folded again, the result agrees."""
    book = Book()

    for event in events:
        outcome = book.apply(event)
        check_is_the_fold(book)
        check_invariants(book.account, book.history)
        if event.balance is not None:
            assert outcome is not Outcome.REFUSED
        elif outcome is not Outcome.REFUSED:
            place = next(i for i, entry in enumerate(book.history) if entry.event is event)
            unbalanced = takewhile(lambda entry: entry.event.balance is None, book.history[place:])
            assert all(entry.balance_after >= 0 for entry in unbalanced)
        if book.history and outcome is Outcome.APPLIED:
            assert book.history[-1].event is event


@given(st.lists(balanced_events, max_size=8, unique_by=lambda event: event.content), st.data())
@settings(max_examples=100, deadline=None)
def test_whatever_carries_a_balance_may_come_in_any_order(events: list[Event], data: st.DataObject) -> None:
    """The account is a pure function of the set of accepted events, true or not."""
    one = fed(events)
    other = fed(data.draw(st.permutations(events)))

    assert one.account == other.account
    assert one.history == other.history
    assert len(one.entries) == len(events)


@given(st.lists(free_events, max_size=8))
@settings(max_examples=80, deadline=None)
def test_a_second_time_changes_nothing(events: list[Event]) -> None:
    """Everything may be sent again: each event gets the answer that it had, and the account stays."""
    book = fed(events)
    account, history, refused = book.account, book.history, dict(book.refused)

    outcomes = {event.event_id: book.apply(event) for event in events}

    assert (book.account, book.history, book.refused) == (account, history, refused)
    assert {event_id for event_id, outcome in outcomes.items() if outcome is Outcome.REFUSED} == set(refused)
    assert set(outcomes.values()) <= {Outcome.DUPLICATE, Outcome.REFUSED}
